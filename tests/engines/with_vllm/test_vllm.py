"""The vLLM engine, run for real on a CPU by `make test-vllm`: it says what the local engine says, before and after training."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT
from test_learning import end_when_solved
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from collm import tiny
from collm.engines.local import LocalEngine
from collm.models.policy import Policy
from collm.models.team import Team
from collm.settings.load import parse_config
from collm.settings.rooms import LoraSettings, VllmSettings
from collm.training.signals import Interrupted
from collm.training.trainer import Trainer
from collm.types import Completion, Message, Request, Sampling

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vllm is not installed here; `make test-vllm` has an environment of its own", allow_module_level=True)

from collm.engines.vllm import VllmEngine

SETTINGS = VllmSettings(max_model_len=1024)
SMOLLM2 = ROOT / "build" / "smollm2"
SYNCED = 1e-3
"""Largest mean gap per token, in nats, between the log-probs of an engine that has the learner's weights and the learner's."""
AGENTS = ("agent_0", "agent_1")
TEXTS = (
    "You are agent_0. Name one of these colours: red, green, blue, yellow.",
    "Build the word IT with blocks.",
    "x" * 50,
    "one\ntwo\nthree",
    "<|im_end|> <|im_start|> is text here.",
    "blocks " * 100,  # longer than a page of the prefix cache
)
GREEDY = Sampling(temperature=0, max_tokens=32)
SAMPLINGS = (Sampling(max_tokens=32), Sampling(temperature=0.6, top_p=0.6, top_k=20, max_tokens=32), GREEDY)


def requests(sampling: Sampling, agents: tuple[str, ...] = AGENTS) -> list[Request]:
    return [
        Request(agent, (Message("user", text),), sampling, seed=7 + 10 * number + place)
        for number, text in enumerate(TEXTS)
        for place, agent in enumerate(agents)
    ]


def rescored(team: Team, completion: Completion, sampling: Sampling) -> np.ndarray:
    """The trainer's log-probs of an engine's answer."""
    assert completion.prompt_ids is not None
    assert completion.token_ids is not None
    policy = team.policies[completion.agent]
    ids = torch.from_numpy(np.concatenate([completion.prompt_ids, completion.token_ids]).astype(np.int64))
    with torch.no_grad():
        hidden = policy.hidden(ids[None, :])[0, len(completion.prompt_ids) - 1 : -1]
        return policy.score(hidden, ids[len(completion.prompt_ids) :], sampling).numpy()


def agrees(engine: VllmEngine, team: Team) -> None:
    """Greedy ids, texts and reasons are the local engine's; log-probs of every sampling are the trainer's."""
    local = LocalEngine(team)
    for sampling in SAMPLINGS:
        asked = requests(sampling, team.agents)
        answers = engine.generate(asked)
        for request, answer, other in zip(asked, answers, local.generate(asked), strict=True):
            assert answer.agent == request.agent
            np.testing.assert_array_equal(answer.prompt_ids, other.prompt_ids)
            np.testing.assert_allclose(answer.logprobs, rescored(team, answer, sampling), atol=1e-3, rtol=0)
            ended = int(answer.token_ids[-1]) in team.policies[request.agent].stop_ids
            assert (answer.finish_reason == "stop") == ended
            assert ended or len(answer.token_ids) == sampling.max_tokens
            if sampling is GREEDY:
                np.testing.assert_array_equal(answer.token_ids, other.token_ids)
                assert (answer.text, answer.finish_reason) == (other.text, other.finish_reason)
                np.testing.assert_allclose(answer.logprobs, other.logprobs, atol=1e-3, rtol=0)


def trainer_of(folder: Path, team: Team | None, engine: VllmEngine | None, **rooms: dict[str, Any]) -> Trainer:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "iterations": 2, "threads": 1, "folder": str(folder), "trackers": [], "device": "cpu"},
        "env": {"name": "agree", "wording": "terse"},
        "rollout": {"tasks": 16, "max_tokens": 4, "engine": "vllm", "vllm": SETTINGS.model_dump()},
        "learner": {"lr": 5e-4},
        "critic": {"lr": 5e-4, "body": "auto"},
        "evaluation": {"every": 0},
    }
    for room, settings in rooms.items():
        values[room] = {**values.get(room, {}), **settings}
    return Trainer(parse_config(values), team=team, engine=engine, quiet=True)


def shift(before: list[Completion], team: Team) -> float:
    """How far training moved the log-probs of greedy answers, at most."""
    return max(float(np.abs(rescored(team, answer, GREEDY) - answer.logprobs).max()) for answer in before)


def mean_gaps(engine: VllmEngine, team: Team) -> dict[str, float]:
    """Agent -> mean |engine's log-prob - learner's| over the tokens of answers sampled now."""
    sampling = SAMPLINGS[0]
    gaps: dict[str, list[np.ndarray]] = {agent: [] for agent in team.agents}
    for answer in engine.generate(requests(sampling, team.agents)):
        gaps[answer.agent].append(np.abs(rescored(team, answer, sampling) - answer.logprobs))
    return {agent: float(np.concatenate(found).mean()) for agent, found in gaps.items()}


def random_policy(model: Any) -> Policy:
    """The tiny tokenizer on a small random model of another shape."""
    return Policy(model, AutoTokenizer.from_pretrained(tiny.folder()))


def shape(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": 1536, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return sizes | {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "eos_token_id": 3} | more


def test_whole_models_before_and_after_training(tmp_path: Path) -> None:
    team = Team.from_pretrained(dict.fromkeys(AGENTS, "tiny"))
    engine = VllmEngine(team, SETTINGS)
    agrees(engine, team)
    before = engine.generate(requests(GREEDY))
    trainer_of(tmp_path, team, engine).run()
    assert shift(before, team) > 0.05
    agrees(engine, team)
    engine.close()


def test_adapters_before_and_after_training(tmp_path: Path) -> None:
    team = Team.from_pretrained(dict.fromkeys(AGENTS, "tiny"), lora=LoraSettings(rank=4))
    engine = VllmEngine(team, SETTINGS)
    agrees(engine, team)
    before = engine.generate(requests(GREEDY))
    trainer_of(tmp_path, team, engine, learner={"lr": 5e-3}).run()
    assert shift(before, team) > 0.05
    agrees(engine, team)
    first, second = engine.generate(requests(GREEDY))[:2]
    assert abs(first.logprobs[0] - second.logprobs[0]) > 1e-3, "each agent has an adapter of its own"
    engine.close()


@pytest.mark.parametrize(("model", "env"), [("tiny", "agree"), (str(SMOLLM2), "quote")], ids=["tiny", "smollm2"])
def test_the_gap_of_each_adapter_is_small_with_a_sync_and_large_without(tmp_path: Path, model: str, env: str) -> None:
    """After one real update, the engine samples from each agent's new adapter only if `load` was called."""
    if model != "tiny" and not SMOLLM2.exists():
        pytest.skip("no build/smollm2: `make smollm2` makes it")
    team = Team.from_pretrained(dict.fromkeys(AGENTS, model), lora=LoraSettings(rank=8))
    engine = VllmEngine(team, SETTINGS)
    rooms: dict[str, dict[str, Any]] = {"env": {"name": env, "agents": list(AGENTS)}, "learner": {"lr": 5e-3}}
    rooms |= {"algorithm": {"name": "magrpo", "group_size": 8}, "rollout": {"tasks": 2, "max_tokens": 8}}
    trainer = trainer_of(tmp_path, team, engine, **rooms)
    trainer.learner.update(trainer.collect(), 0)
    without = mean_gaps(engine, team)
    assert min(without.values()) > SYNCED, without
    engine.load(team)
    after = mean_gaps(engine, team)
    assert max(after.values()) < SYNCED, after
    with torch.no_grad():
        for tensor in team.policies["agent_0"].adapter.tensors().values():
            tensor.add_(0.02 * torch.randn(tensor.shape))
    one = mean_gaps(engine, team)
    assert one["agent_0"] > SYNCED > one["agent_1"], one
    print(f"{model}: mean gap without the sync {without}, with it {after}, one adapter of two changed {one}")
    engine.close()


def test_a_mixed_team_of_other_families() -> None:
    """A tied Qwen3, a Llama, an adapter on the tiny model, and that adapter again for another agent."""
    torch.manual_seed(0)
    adapted = Policy.from_pretrained("tiny", lora=LoraSettings(rank=2), seed=1)
    with torch.no_grad():
        for tensor in adapted.adapter.tensors().values():
            tensor.normal_(std=0.05)
    team = Team(
        {
            "tied": random_policy(Qwen3ForCausalLM(Qwen3Config(**shape(tie_word_embeddings=True)))),
            "llama": random_policy(LlamaForCausalLM(LlamaConfig(**shape(tie_word_embeddings=False)))),
            "adapted": adapted,
            "again": adapted,
        }
    )
    engine = VllmEngine(team, SETTINGS)
    agrees(engine, team)
    with torch.no_grad():
        for policy in team.members().values():
            for tensor in policy.trained.parameters():
                tensor.add_(0.02 * torch.randn(tensor.shape))
    asked = requests(GREEDY, team.agents)
    stale = [np.abs(rescored(team, answer, GREEDY) - answer.logprobs).max() for answer in engine.generate(asked)]
    assert min(stale[: len(team.agents)]) > 1e-2, "weights change only by `load`"
    engine.load(team)
    agrees(engine, team)
    engine.close()


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    """Four iterations equal two, a new process's engine, and two more: the same rewards, losses and weights."""
    long = trainer_of(tmp_path / "long", None, None, run={"iterations": 4})
    short = trainer_of(tmp_path / "short", None, None, run={"iterations": 4})
    iterate = short._iterate

    def stop_after_two(*arguments: Any) -> None:
        iterate(*arguments)
        if short.iteration == 2:
            raise Interrupted(signal.SIGTERM)

    short._iterate = stop_after_two  # type: ignore[method-assign]
    long.run()
    with pytest.raises(Interrupted):
        short.run()
    resumed = Trainer.resume(short.folder, quiet=True)
    resumed.run()
    assert resumed.iteration == 4
    for agent, policy in long.team.policies.items():
        other = resumed.team.policies[agent].model.state_dict()
        for name, tensor in policy.model.state_dict().items():
            assert torch.equal(tensor, other[name]), name
    for trainer in (long, short, resumed):
        trainer.engine.close()  # type: ignore[attr-defined]


def test_bfloat16() -> None:
    """Half precision on the way: the trainer's float32 weights, multiplied in bfloat16 by both."""
    team = Team.from_pretrained({"agent_0": "tiny"}, compute="bfloat16")
    engine = VllmEngine(team, SETTINGS)
    for answer in engine.generate(requests(GREEDY, team.agents)):
        assert np.abs(rescored(team, answer, GREEDY) - answer.logprobs).mean() < 0.05
    engine.close()


def test_seeds_limits_and_training(tmp_path: Path) -> None:
    """One engine, made by the trainer from its config: random numbers, long histories, then `agree` solved as locally."""
    trainer = trainer_of(tmp_path, None, None, run={"iterations": 30}, rollout={"tasks": 64})
    engine = trainer.engine
    assert isinstance(engine, VllmEngine)
    sampling = Sampling(max_tokens=16)
    asked = requests(sampling)
    together = engine.generate(asked)
    for request, answer in list(zip(asked, together, strict=True))[:4]:
        np.testing.assert_array_equal(engine.generate([request])[0].token_ids, answer.token_ids)
    siblings = [Request("agent_0", asked[0].messages, sampling, seed=seed) for seed in range(2**63 - 16, 2**63)]
    assert len({answer.text for answer in engine.generate(siblings)}) > 1
    long = Request("agent_0", (Message("user", "word " * 2000),), sampling)
    failed, fine = engine.generate([long, asked[0]])
    assert failed.finish_reason == "error"
    assert "1024 positions" in failed.error
    np.testing.assert_array_equal(fine.token_ids, together[0].token_ids)

    before = score(trainer)
    end_when_solved(trainer)
    trainer.run()
    after = score(trainer)
    print(f"agree through vLLM: {before:.2f} -> {after:.2f}")
    assert before <= 0.4
    assert after >= 0.9


def score(trainer: Trainer, episodes: int = 256) -> float:
    from collm import seeds
    from collm.rollout.collect import collect
    from collm.training.task import num_tasks

    total = num_tasks(trainer.plan)
    tasks = [index % total for index in range(episodes)]
    groups = collect(trainer.plan, trainer.engine, tasks, [seeds.derive("score", index) for index in range(episodes)])
    return float(np.mean([episode.score for group in groups for episode in group.episodes]))
