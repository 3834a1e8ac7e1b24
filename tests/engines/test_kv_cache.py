"""What was read of a history is not read again in the next turn, and answers are the same."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_learning import make_trainer
from test_logprobs import absolute_positions
from test_lora import stirred
from transformers import MistralConfig, MistralForCausalLM

from collm.engines.catalogue import make_engine
from collm.engines.local import LocalEngine
from collm.engines.mixed import MixedEngine
from collm.envs.catalogue import EnvSpec
from collm.models.adapters import Base
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.settings.load import parse_config
from collm.settings.rooms import LoraSettings
from collm.types import Completion, Group, Message, Request, Sampling


def build(turns: int = 4) -> EnvSpec:
    settings = {"world": "persistent", "turns": turns, "strings": ["IT", "CE", "C"], "feedback": "score"}
    return EnvSpec("str_build", {"wording": "terse", **settings})


class Counting(LocalEngine):
    """Notes, call by call, how many tokens went through the models and how many the prompts have."""

    def __init__(self, team: Team, **settings):
        super().__init__(team, **settings)
        self.read, self.asked, self.most_held = [], [], 0

    def generate(self, requests):
        read = []
        hooks = [
            body.register_forward_hook(lambda _, __, given, ___: read.append(given["input_ids"].shape), with_kwargs=True)
            for body in {policy.model.base_model for policy in self.team.policies.values()}
        ]
        completions = super().generate(requests)
        for hook in hooks:
            hook.remove()
        self.read.append([tuple(shape) for shape in read if shape[1] > 1])
        self.asked.append(sum(len(completion.prompt_ids) for completion in completions if completion.prompt_ids is not None))
        self.most_held = max(self.most_held, sum(memory.tokens for memory in self._memories.values()))
        return completions


def team(*policies: Policy) -> Team:
    one, two = policies if len(policies) == 2 else policies * 2
    return Team({"builder_0": one, "builder_1": two})


def two_adapters() -> tuple[Policy, Policy]:
    base = Base.from_pretrained("tiny")
    one, two = (Policy(base.model, base.tokenizer, adapter=base.add(LoraSettings(rank=2), seed)) for seed in (1, 2))
    return stirred(one, 1), stirred(two, 2)


def completions(groups: list[Group]) -> list[Completion]:
    return [c for g in groups for e in g.episodes for turn in e.turns for c in turn.completions.values()]


def check_same(groups: list[Group], others: list[Group]) -> None:
    for one, other in zip(completions(groups), completions(others), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.prompt_ids.tolist() == other.prompt_ids.tolist()
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=40), Sampling(temperature=0.6, top_p=0.6, max_tokens=24)])
@pytest.mark.parametrize("kind", ["tiny", "absolute positions", "two policies", "two adapters"])
def test_answers_are_those_without_memory(tiny, kind, sampling):
    policies = {
        "tiny": (tiny,),
        "absolute positions": (absolute_positions(tiny),),
        "two policies": (tiny, absolute_positions(tiny)),
        "two adapters": two_adapters(),
    }
    if kind in ("absolute positions", "two policies"):  # room for 256 positions
        sampling = replace(sampling, max_tokens=8)
    plan = Plan(build(2 if sampling.max_tokens == 8 else 4), sampling=sampling)
    told, anew = Counting(team(*policies[kind]), remember=True), LocalEngine(team(*policies[kind]))
    groups = collect(replace(plan, group_size=2), told, [0, 1, 2], [1, 2, 3])
    check_same(groups, collect(replace(plan, group_size=2), anew, [0, 1, 2], [1, 2, 3]))
    lengths = {len(c.token_ids) for c in completions(groups)}
    assert kind != "tiny" or len(lengths) > 2  # rows left the batch at different times
    for shapes, asked in zip(told.read[1:], told.asked[1:], strict=True):
        rows, columns = sum(n for n, _ in shapes), max(length for _, length in shapes)
        assert rows * columns < 0.6 * asked


@pytest.mark.parametrize("kind", ["tiny", "absolute positions", "two adapters"])
def test_what_all_prompts_begin_with_is_read_once(tiny, monkeypatch, kind):
    """Three requests of each agent begin with the same 72 tokens or more: one row reads them, and later turns go on."""
    policies = {"tiny": (tiny,), "absolute positions": (absolute_positions(tiny),), "two adapters": two_adapters()}[kind]
    beginning = (Message("user", "the same worked example " * 10), Message("assistant", "and its answer"))
    ends = ["red", "a longer request of another task", "blue"]
    requests = [
        Request(agent, (*beginning, Message("user", end)), Sampling(max_tokens=8), seed=number)
        for number, end in enumerate(ends)
        for agent in ("builder_0", "builder_1")
    ]
    together, apart = Counting(team(*policies), remember=True), LocalEngine(team(*policies))
    found = together.generate(requests)
    monkeypatch.setattr("collm.engines.local.BEGINNING", 10_000)
    wanted = apart.generate(requests)
    shared = min(length for rows, length in together.read[0] if rows == 1)
    assert shared >= 72
    assert sum(rows * length for rows, length in together.read[0]) < together.asked[0] - 2 * shared
    later = [
        replace(request, messages=(*request.messages, Message("assistant", one.text, one.token_ids), Message("user", "go on")))
        for request, one in zip(requests, found, strict=True)
    ]
    for ones, others in ((found, wanted), (together.generate(later), apart.generate(later))):
        for one, other in zip(ones, others, strict=True):
            assert one.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_each_turn_reads_what_is_new_and_no_more(tiny):
    """Prompts of turn t + 1 beyond prompt and answer of turn t, and the last token of that answer, which nothing had read."""
    engine = Counting(team(tiny), remember=True)
    groups = collect(Plan(build(), sampling=Sampling(max_tokens=40)), engine, [1, 2], [1, 2])
    episodes = [group.episodes[0] for group in groups]
    for t in range(1, 4):
        new = [
            len(after.prompt_ids) - len(before.prompt_ids) - len(before.token_ids) + 1
            for episode in episodes
            for before, after in (
                (episode.turns[t - 1].completions[agent], episode.turns[t].completions[agent]) for agent in episode.agents
            )
        ]
        assert [length for _, length in engine.read[t]] == [max(new)]


def test_a_tree_goes_on_from_its_nodes(tiny):
    plan = Plan(build(3), sampling=Sampling(max_tokens=20), group_size=2, tree=True)
    told = Counting(team(tiny), remember=True)
    check_same(collect(plan, told, [0], [1]), collect(plan, LocalEngine(team(tiny)), [0], [1]))
    assert max(length for _, length in told.read[2]) < 80


@pytest.mark.parametrize("history", ["newest", "last"])
def test_a_history_that_does_not_go_on_is_read_anew(tiny, history):
    plan = Plan(build(), history=history, sampling=Sampling(max_tokens=20))
    told = Counting(team(tiny), remember=True)
    check_same(collect(plan, told, [0, 1], [1, 2]), collect(plan, LocalEngine(team(tiny)), [0, 1], [1, 2]))


def test_new_weights_forget(tiny):
    """Between two turns the team is given other weights: the next answers are theirs alone."""
    torch.manual_seed(1)
    other = Policy.from_pretrained("tiny")
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.mul_(1.2)
    sampling = Sampling(temperature=0.0, max_tokens=12)
    engine = Counting(Team({"a": tiny}), remember=True)
    chat = (Message("user", "Name one colour."),)
    (answer,) = engine.generate([Request("a", chat, sampling, 1)])
    chat = (*chat, Message("assistant", answer.text, answer.token_ids), Message("user", "And another one?"))
    assert engine.most_held == len(answer.prompt_ids) + len(answer.token_ids) - 1
    engine.load(Team({"a": other}))
    (again,) = engine.generate([Request("a", chat, sampling, 2)])
    (alone,) = LocalEngine(Team({"a": other})).generate([Request("a", chat, sampling, 2)])
    np.testing.assert_allclose(again.logprobs, alone.logprobs, atol=1e-5)
    assert engine.read[-1] == [(1, len(again.prompt_ids))]
    engine.rest()
    assert not engine._memories


def test_memory_stays_within_half_of_the_batch(tiny):
    plan = Plan(build(), sampling=Sampling(max_tokens=20))
    anew = collect(plan, LocalEngine(team(tiny)), [0, 1, 2], [1, 2, 3])
    held = []
    for batch_tokens in (1 << 17, 2000, 400):
        engine = Counting(team(tiny), remember=True, batch_tokens=batch_tokens)
        check_same(collect(plan, engine, [0, 1, 2], [1, 2, 3]), anew)
        assert engine.most_held <= batch_tokens // 2
        held.append(engine.most_held)
        assert engine.read[3] == [] or max(length for _, length in engine.read[3]) > 0
    assert held[0] > held[1] > held[2] == 0


@pytest.mark.parametrize("batch_tokens", [2500, 4000])
def test_who_is_remembered_does_not_hang_on_memory_addresses(tiny, batch_tokens):
    """Room for the history of one of two equal policies: swapped, the same agent's is kept and no log-prob differs by a bit."""
    twin = copy.copy(tiny)
    plan = Plan(build(), sampling=Sampling(max_tokens=40))

    def play(*policies: Policy) -> list[list[float]]:
        engine = LocalEngine(team(*policies), batch_tokens=batch_tokens, remember=True)
        groups = collect(replace(plan, group_size=2), engine, [0, 1, 2], [1, 2, 3])
        return [completion.logprobs.tolist() for completion in completions(groups)]

    assert play(tiny, twin) == play(twin, tiny)


@pytest.mark.parametrize("batch_tokens", [2500, 4000])
def test_a_model_keeps_and_batches_the_same_beside_others_as_alone(tiny, batch_tokens):
    """Also where the kept histories of both are more than one budget: models may be in processes of their own."""
    twin = copy.copy(tiny)
    plan = Plan(build(), sampling=Sampling(max_tokens=40), group_size=2)
    together = Counting(team(tiny, twin), batch_tokens=batch_tokens, remember=True)
    groups = collect(plan, together, [0, 1, 2], [1, 2, 3])
    alone = {agent: Counting(team(tiny, twin), batch_tokens=batch_tokens, remember=True) for agent in team(tiny, twin).agents}
    again = collect(plan, MixedEngine(alone["builder_0"], {"builder_1": alone["builder_1"]}), [0, 1, 2], [1, 2, 3])
    assert [c.logprobs.tolist() for c in completions(groups)] == [c.logprobs.tolist() for c in completions(again)]
    assert together.most_held > max(engine.most_held for engine in alone.values()) > 0


@pytest.mark.parametrize(("rope", "remembers"), [("default", True), ("linear", True), ("dynamic", False), ("longrope", False)])
def test_keys_that_turn_with_the_length_of_the_text_are_not_kept(tiny, monkeypatch, rope, remembers):
    monkeypatch.setattr(tiny.model.config.get_text_config(), "rope_parameters", {"rope_type": rope, "rope_theta": 10000.0})
    engine = LocalEngine(Team({"a": tiny}), remember=True)
    engine.generate([Request("a", (Message("user", "Name one colour."),), Sampling(max_tokens=4), 1)])
    assert bool(engine._memories) == remembers


def test_models_that_look_back_only_so_far_are_read_anew(tiny):
    sizes = {"vocab_size": 1536, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=1, sliding_window=16, eos_token_id=3, bos_token_id=None)
    )
    policy = Policy(model, tiny.tokenizer)
    engine = Counting(team(policy), remember=True)
    collect(Plan(build(2), sampling=Sampling(max_tokens=4)), engine, [0], [1])
    assert engine.most_held == 0


def test_training_and_evaluation_remember(tiny):
    assert make_engine(team(tiny), parse_config({"env": {"name": "agree", "wording": "terse"}}).rollout).remember
    assert not LocalEngine(team(tiny)).remember


def test_what_an_evaluation_read_is_gone_when_training_goes_on(tmp_path):
    """A run that is resumed after it begins with nothing read, and must go on as the one that was not stopped."""
    trainer = make_trainer(
        tmp_path, "collm-cc", 2, 0, run={"iterations": 1}, evaluation={"every": 1, "episodes": 4}, rollout={"tasks": 4}
    )
    trainer.run()
    assert not trainer.engine._memories
