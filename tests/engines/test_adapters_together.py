"""Adapters of one base are decoded in one batch; each agent's answers are those of a batch of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_lora import stirred
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM

from collm.engines import local
from collm.engines.local import LocalEngine, Segment, decode
from collm.models.adapters import Base, Stack
from collm.models.policy import Policy
from collm.models.team import Team
from collm.settings.rooms import LoraSettings
from collm.types import Completion, Message, Request, Sampling

SAMPLINGS = {
    "a": Sampling(temperature=0.0, max_tokens=12),
    "b": Sampling(temperature=0.8, top_p=0.9, max_tokens=20),
    "c": Sampling(temperature=0.8, top_p=0.9, max_tokens=5),
}
TEXTS = ("Name one colour.", "Build IT together.", "again " * 20)
LORAS = (LoraSettings(rank=4), LoraSettings(rank=8, alpha=8, targets=["q_proj", "down_proj"]), LoraSettings(rank=3))


@pytest.fixture(scope="module")
def team() -> Team:
    """Three adapters that differ in rank, alpha and layers."""
    base = Base.from_pretrained("tiny")
    policies = [Policy(base.model, base.tokenizer, adapter=base.add(lora, n)) for n, lora in enumerate(LORAS)]
    return Team({agent: stirred(policy, seed) for seed, (agent, policy) in enumerate(zip("abc", policies, strict=True))})


def requests(texts: Sequence[str] = TEXTS) -> list[Request]:
    return [
        Request(agent, (Message("user", text),), SAMPLINGS[agent], seed)
        for seed, (text, agent) in enumerate((text, agent) for text in texts for agent in "abc")
    ]


def alone(team: Team, asked: Sequence[Request]) -> list[Completion]:
    """Each agent's answers from a call of its own."""
    answers = {}
    for agent, policy in team.policies.items():
        own = [i for i, request in enumerate(asked) if request.agent == agent]
        answers |= dict(zip(own, LocalEngine(Team({agent: policy})).generate([asked[i] for i in own]), strict=True))
    return [answers[i] for i in range(len(asked))]


def same(one: Sequence[Completion], other: Sequence[Completion]) -> bool:
    return all(
        a.token_ids.tolist() == b.token_ids.tolist()
        and a.finish_reason == b.finish_reason
        and np.allclose(a.logprobs, b.logprobs, rtol=0, atol=1e-4)
        for a, b in zip(one, other, strict=True)
    )


def passes(team: Team, asked: Sequence[Request]) -> list[torch.Size]:
    """Shapes of the ids that the base reads in one call."""
    shapes: list[torch.Size] = []
    body = team.policies["a"].adapter.base.body
    hook = body.register_forward_pre_hook(lambda _, __, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    LocalEngine(team).generate(asked)
    hook.remove()
    return shapes


def test_answers_are_those_of_one_agent_alone(team: Team) -> None:
    answers = LocalEngine(team).generate(requests())
    assert same(answers, alone(team, requests()))
    assert {len(answer.token_ids) for answer in answers} >= {5, 12}  # each agent's own max_tokens
    for request, answer in zip(requests(), answers, strict=True):
        policy = team.policies[request.agent]
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.token_ids])).long()
        with torch.no_grad():
            hidden_KD = policy.hidden(ids[None])[0, len(answer.prompt_ids) - 1 : -1]
            scored = policy.score(hidden_KD, ids[len(answer.prompt_ids) :], request.sampling)
        np.testing.assert_allclose(answer.logprobs, scored, atol=1e-4)  # as the learner scores them


def test_swapped_rows_are_noticed(team: Team, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = alone(team, requests())
    monkeypatch.setattr(local, "Stack", lambda adapters: Stack([*adapters[1::-1], *adapters[2:]]))
    assert not same(LocalEngine(team).generate(requests()), apart)


def test_tokens_are_decoded_together_and_prompts_by_agent(team: Team) -> None:
    shapes = passes(team, requests())
    assert [shape[0] for shape in shapes[:3]] == [3, 3, 3]
    assert shapes[3] == (9, 1)
    assert len(shapes) == 3 + max(sampling.max_tokens for sampling in SAMPLINGS.values()) - 1
    assert max(shape[0] for shape in shapes[-5:]) <= 3  # the rows of a and c have left


def test_the_answer_does_not_depend_on_team_mates_or_on_the_size_of_batches(team: Team) -> None:
    answers = LocalEngine(team).generate(requests())
    others = [*requests()[::3], *requests(["Something else altogether, and longer than all the other prompts. " * 3])[1:]]
    assert same(LocalEngine(team).generate(others)[:3], answers[::3])
    assert same(LocalEngine(team, batch_tokens=200).generate(requests()), answers)


def test_a_prompt_that_is_too_long_fails_alone(team: Team) -> None:
    asked = requests()
    asked[4] = replace(asked[4], sampling=Sampling(max_tokens=team.policies["b"].max_positions))
    answers = LocalEngine(team).generate(asked)
    assert [i for i, answer in enumerate(answers) if answer.finish_reason == "error"] == [4]
    assert same([*answers[:4], *answers[5:]], [c for i, c in enumerate(alone(team, requests())) if i != 4])


def test_siblings_share_a_prompt_and_draw_from_their_own_seeds(team: Team) -> None:
    asked = [
        Request(agent, (Message("user", "Name one colour."),), SAMPLINGS["b"], seed) for agent in "ab" for seed in range(4)
    ]
    assert [shape[0] for shape in passes(team, asked)][:3] == [1, 1, 8]
    assert same(LocalEngine(team).generate(asked), alone(team, asked))


def test_one_policy_with_two_sampling_settings_is_one_batch(tiny: Policy) -> None:
    prompts = [tiny.chat.encode((Message("user", text),)) for text in TEXTS]
    uniforms = torch.rand(len(prompts), 12)
    segments = [Segment(tiny, prompts, uniforms[:, : s.max_tokens], s) for s in (SAMPLINGS["a"], SAMPLINGS["c"])]
    with torch.inference_mode():
        together = decode(segments)
        apart = [answer for segment in segments for answer in decode([segment])]
    for (ids, logprobs), (others, also) in zip(together, apart, strict=True):
        assert ids.tolist() == others.tolist()
        np.testing.assert_allclose(logprobs, also, atol=1e-4)


def test_a_row_that_has_finished_is_not_read_beyond_the_model_s_positions() -> None:
    """A long prompt with a short answer beside short prompts with long answers; the positions are learned ones."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    policy: Any = SimpleNamespace(
        model=model, body=model.base_model, logits=model.lm_head, adapter=None, compute="float32", stop_ids=[63],
        device=torch.device("cpu"), max_positions=32,
    )  # fmt: skip

    def segment(rows: int, length: int, max_tokens: int) -> Segment:
        prompts = [np.arange(length, dtype=np.int32) + row for row in range(rows)]
        return Segment(policy, prompts, torch.full((rows, max_tokens), 0.3), Sampling(max_tokens=max_tokens))

    segments = [segment(1, 30, 2), segment(6, 4, 20)]
    with torch.inference_mode():
        together, apart = decode(segments), [answer for each in segments for answer in decode([each])]
    assert [ids.tolist() for ids, _ in together] == [ids.tolist() for ids, _ in apart]


def test_bfloat16_bases_give_close_log_probs() -> None:
    team = Team.from_pretrained({"a": "tiny", "b": "tiny"}, lora=LoraSettings(rank=4), compute="bfloat16")
    for seed, policy in enumerate(team.policies.values()):
        stirred(policy, seed)
    asked = [request for request in requests() if request.agent != "c"]
    gaps = []
    for request, answer in zip(asked, LocalEngine(team).generate(asked), strict=True):
        policy, start = team.policies[request.agent], len(answer.prompt_ids)
        ids = torch.from_numpy(np.concatenate([answer.prompt_ids, answer.token_ids])).long()
        with torch.no_grad():
            scored = policy.score(policy.hidden(ids[None])[0, start - 1 : -1], ids[start:], request.sampling)
        gaps.append(np.abs(answer.logprobs - scored.numpy()).mean())
    assert np.mean(gaps) < 0.05


@pytest.mark.parametrize("kind", ["tiny", "sliding window", "rows and tokens in one"])
def test_which_models_decode_adapters_together(kind: str, tiny: Policy) -> None:
    sizes = {"vocab_size": 1536, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 3}
    if kind == "tiny":
        model = Base.from_pretrained("tiny").model
    elif kind == "sliding window":
        model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, intermediate_size=32, sliding_window=16))
    else:
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=32))
    base = Base(model, tiny.tokenizer)
    one, two = (Policy(model, tiny.tokenizer, adapter=base.add(LoraSettings(rank=2), seed)) for seed in (1, 2))
    assert local._one_batch(one, two) == (kind == "tiny")
    assert local._one_batch(one, one)
    assert not local._one_batch(one, tiny)
    asked = [Request(agent, (Message("user", "red"),), Sampling(max_tokens=length), 1) for agent in "ab" for length in (3, 4)]
    team = Team({"a": stirred(one, 1), "b": stirred(two, 2)})
    assert same(LocalEngine(team).generate(asked), alone(team, asked))
