"""Updates that read shared beginnings once are those of one pass per sequence; and nothing is learned where nothing can be."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import learners
import numpy as np
import pytest
import torch
from places import ROOT

from collm.learning import parts
from collm.learning.pack import Packed, Row, rows_of
from collm.models import sharing
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Group

SMOLLM2 = ROOT / "build" / "smollm2"
BUILD = {"name": "str_build", "world": "persistent", "turns": 3, "strings": ["IT", "C"]}
GROUPS = {"name": "magrpo", "group_size": 4}
UPDATES: dict[str, dict[str, Any]] = {
    "groups": {},
    "groups of three turns": {"env": BUILD, "rollout": {"tasks": 2, "max_tokens": 8}},
    "turn trees": {"algorithm": {**GROUPS, "tree": True}, "env": {"turns": 2}},
    "worked examples, of different tasks": {
        "algorithm": {"name": "collm-cc"},
        "critic": {"body": "auto"},
        "env": {"name": "str_build", "strings": ["IT", "C", "HI"]},
        "rollout": {"examples": 2, "max_tokens": 8},
    },
    "adapters": {"team": {"lora": {"rank": 4}}},
    "a shared policy": {"team": {"shared": True}},
    "a joint critic": {"algorithm": {"name": "collm-cc", "group_size": 4}, "critic": {"body": "auto"}, "env": {"turns": 2}},
    "value heads": {"algorithm": {"name": "collm-dc", "group_size": 4}, "critic": {"body": "policy"}, "env": {"turns": 2}},
    "resampled answers": {"algorithm": {"name": "collm-cc", "baseline": "counterfactual", "resamples": 3}},
    "KL, recomputed layers, small batches": {
        "algorithm": {**GROUPS, "kl_coef": 0.1},
        "learner": {"gradient_checkpointing": True, "micro_batch_tokens": 150},
    },
}


def trainer_of(folder: Path, **rooms: dict[str, Any]) -> Trainer:
    rooms = {
        **rooms,
        "env": {"name": "agree", **rooms.get("env", {})},
        "run": {"folder": str(folder), "threads": 1, "trackers": []},
        "algorithm": rooms.get("algorithm", GROUPS),
        "rollout": {"tasks": 3, "max_tokens": 6, **rooms.get("rollout", {})},
        "evaluation": {"every": 0},
    }
    return Trainer(parse_config(rooms), quiet=True)


def with_rewards(groups: list[Group], draw: Callable[[], float]) -> list[Group]:
    for group in groups:
        for episode in group.episodes:
            for turn in episode.turns:
                turn.reward = draw()
    return groups


def updated(trainer: Trainer, groups: list[Group], monkeypatch, *, trees: bool) -> tuple[dict[str, torch.Tensor], Any]:
    """Every part's gradient before its step, and the update's metrics."""
    gradients: dict[str, torch.Tensor] = {}

    def kept(optimizer: Any, label: str, *others: Any) -> float:
        every = [p for group in optimizer.param_groups for p in group["params"]]
        gradients[label] = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in every])
        optimizer.zero_grad()
        return gradients[label].norm().item()

    with monkeypatch.context() as patched:
        patched.setattr(parts, "step", kept)
        if not trees:
            patched.setattr(Policy, "reads_trees", False)
            patched.setattr(Critic, "reads_trees", False)
        metrics = trainer.learner.update(groups, 0).metrics
    return gradients, metrics


def compare(folder: Path, monkeypatch, tolerance: float, **rooms: dict[str, Any]) -> tuple[Any, Any]:
    """All that begins alike is shared; rewards are random, and value heads read what their bodies say."""
    monkeypatch.setattr(sharing, "PAIRS_PER_TOKEN", 1 << 30)
    one, other = trainer_of(folder / "one", **rooms), trainer_of(folder / "other", **rooms)
    for trainer in (one, other):
        for head in learners.value_heads(trainer.learner).values():
            torch.nn.init.normal_(head.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    groups = with_rewards(one.collect(), random.Random(0).random)
    shared, less = updated(one, groups, monkeypatch, trees=True)
    alone, more = updated(other, groups, monkeypatch, trees=False)
    assert shared.keys() == alone.keys()
    assert any(gradient.norm() > 0 for gradient in alone.values())
    for label, gradient in alone.items():
        assert (shared[label] - gradient).norm() <= tolerance * gradient.norm(), label
    for name, value in more.items():
        if not name.startswith(("tokens", "seconds")) and not name.endswith(("zero_advantages", "skipped")):
            assert less[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    for name in less:
        assert not name.endswith("logprob_gap_max") or less[name] < 1e-4
    return less, more


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_are_those_of_one_pass_per_sequence(tmp_path: Path, monkeypatch, update: str) -> None:
    less, more = compare(tmp_path, monkeypatch, 1e-5, **UPDATES[update])
    read = [sum(value for name, value in metrics.items() if name.startswith("tokens/")) for metrics in (less, more)]
    assert read[0] < 0.9 * read[1]


def test_they_agree_to_the_rounding_of_bfloat16(tmp_path: Path, monkeypatch) -> None:
    rooms = {"team": {"compute": "bfloat16", "lora": {"rank": 4}}}
    one, other = trainer_of(tmp_path / "one", **rooms), trainer_of(tmp_path / "other", **rooms)
    groups = with_rewards(one.collect(), random.Random(0).random)
    shared, alone = updated(one, groups, monkeypatch, trees=True)[0], updated(other, groups, monkeypatch, trees=False)[0]
    for label, gradient in alone.items():
        assert (shared[label] - gradient).norm() <= 0.1 * gradient.norm()


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="build/smollm2 is not there: make smollm2")
@pytest.mark.parametrize("team", [{"shared": True}, {"lora": {"rank": 8}}], ids=["a whole model", "adapters"])
def test_gradients_of_real_weights_are_those_of_one_pass_per_sequence(
    tmp_path: Path, monkeypatch, team: dict[str, Any]
) -> None:
    rooms = {
        "team": {"model": str(SMOLLM2), **team},
        "env": {"agents": 2, "turns": 2},
        "rollout": {"tasks": 1, "max_tokens": 8},
    }
    compare(tmp_path, monkeypatch, 1e-5, algorithm={**GROUPS, "normalize": "none"}, **rooms)


# --- rows ----------------------------------------------------------------------------------------------------------------


def packed_of(*texts: str) -> list[Packed]:
    return [Packed(np.array([ord(c) for c in text])) for text in texts]


def test_a_row_is_a_tree_in_depth_first_order() -> None:
    row = Row.of(packed_of("ab", "abd", "acd"))
    assert "".join(map(chr, row.ids)) == "abdcd"
    assert row.positions.tolist() == [0, 1, 2, 1, 2]
    assert row.ends.tolist() == [5, 3, 3, 5, 5]
    assert [columns.tolist() for columns in row.columns] == [[0, 1], [0, 1, 2], [0, 3, 4]]
    assert row.branches
    assert not Row.of(packed_of("a", "ab", "ab")).branches


def test_sequences_share_a_row_where_that_saves_work() -> None:
    alike = packed_of("x" * 40 + "a", "y", "x" * 40 + "b")
    assert [len(row.sequences) for row in rows_of(alike, 1000, trees=True)] == [2, 1]
    assert [len(row.sequences) for row in rows_of(alike, 1000, trees=False)] == [1, 1, 1]
    assert [len(row.sequences) for row in rows_of(alike, 41, trees=True)] == [1, 1, 1]
    little = packed_of("x" + "a" * 800, "x" + "b" * 800)
    assert [len(row.sequences) for row in rows_of(little, 10_000, trees=True)] == [1, 1]


# --- nothing to learn ----------------------------------------------------------------------------------------------------


def backwards(monkeypatch) -> list[None]:
    """Grows with every backward pass."""
    seen: list[None] = []
    whole = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda *a, **k: (seen.append(None), whole(*a, **k))[1])
    return seen


def test_without_an_advantage_there_is_no_backward_pass_and_the_step_is_that_of_a_zero_gradient(
    tmp_path: Path, monkeypatch
) -> None:
    trainer, other = trainer_of(tmp_path / "one"), trainer_of(tmp_path / "other")
    first = trainer.collect()
    for each in (trainer, other):
        metrics = each.learner.update(first, 0).metrics
        assert metrics["agent_0/zero_advantages"] < 1
        assert metrics["agent_0/skipped"] == 0
    before = {name: tensor.clone() for name, tensor in learners.weights(trainer.learner).items()}
    groups = with_rewards(trainer.collect(), float)
    seen = backwards(monkeypatch)
    metrics = trainer.learner.update(groups, 1).metrics
    assert not seen
    assert metrics["agent_0/zero_advantages"] == metrics["agent_0/skipped"] == 1
    assert metrics["agent_0/gradient_norm"] == 0
    assert "agent_0/logprob_gap_max" in metrics
    for optimizer in learners.optimizers(other.learner).values():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    after, wanted = learners.weights(trainer.learner), learners.weights(other.learner)
    assert all(torch.equal(after[name], wanted[name]) for name in after)
    assert any(not torch.equal(after[name], before[name]) for name in after)  # by momentum


def test_a_penalty_is_learned_without_an_advantage(tmp_path: Path, monkeypatch) -> None:
    trainer = trainer_of(tmp_path, algorithm={**GROUPS, "kl_coef": 0.1})
    groups = with_rewards(trainer.collect(), float)
    seen = backwards(monkeypatch)
    metrics = trainer.learner.update(groups, 0).metrics
    assert seen
    assert metrics["agent_0/zero_advantages"] == 1
    assert metrics["agent_0/skipped"] == 0


def test_a_critic_without_an_error_is_not_trained(tmp_path: Path, monkeypatch) -> None:
    """Heads predict 0 at the start, which is right where every reward is 0."""
    for number, critic in enumerate(("model", "policy")):
        trainer = trainer_of(
            tmp_path / str(number), algorithm={"name": "collm-dc", "normalize": "none"}, critic={"body": critic}
        )
        groups = with_rewards(trainer.collect(), float)
        seen = backwards(monkeypatch)
        assert trainer.learner.update(groups, 0).metrics["agent_0/critic/loss"] == 0
        assert not seen
