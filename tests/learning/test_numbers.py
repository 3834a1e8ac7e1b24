"""What an update may and may not do to numbers: float32 masters, same seed same run, accumulation, non-finite values, names."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import learners
import pytest
import torch
from test_learning import make_trainer as trainer_of

from collm.envs.base import Outcome, TextEnv
from collm.errors import TrainingError
from collm.runs.log import read_metrics
from collm.settings.load import parse_config
from collm.training.trainer import Trainer


class Broken(TextEnv):
    """Pays infinity at the second turn of task 1."""

    num_tasks = 2

    def __init__(self) -> None:
        super().__init__(["a", "b"], 2)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return {agent: "Name one colour." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        reward = float("inf") if self.task and self.last_turn else 1.0
        return Outcome(reward, {}, {agent: "Again." for agent in self.agents})

    def task_name(self, task: int) -> str:
        return ("fine", "poisoned")[task]


def make_trainer(folder: Path, name: str, agents: int, seed: int, **changes: dict[str, Any]) -> Trainer:
    """With a language model as critic, whose numbers are looked at here."""
    changes["critic"] = {"body": "auto", **changes.get("critic", {})}
    return trainer_of(folder, name, agents, seed, **changes)


def one_iteration(folder: Path, **changes: dict[str, Any]) -> Trainer:
    changes = {"run": {"iterations": 1}, "rollout": {"tasks": 8}, "env": {"turns": 2}, **changes}
    trainer = make_trainer(folder, changes.pop("name", "collm-cc"), 2, 0, **changes)
    trainer.run()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return learners.weights(trainer.learner)


def test_masters_are_float32_and_move_under_bfloat16_compute(tmp_path: Path) -> None:
    """At 5e-6 a bfloat16 weight of 0.02 would round back to itself: its spacing there is 1.2e-4."""
    trainer = make_trainer(
        tmp_path, "collm-cc", 2, 0, team={"compute": "bfloat16"}, learner={"lr": 5e-6}, run={"iterations": 1}
    )
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    trainer.run()
    for name, tensor in weights(trainer).items():
        assert tensor.dtype == torch.float32, name
    moved = [
        (weights(trainer)[n] != before[n]).float().mean().item() for n in before if n.startswith("agent_0.") and "proj" in n
    ]
    assert min(moved) > 0.9
    for optimizer in learners.optimizers(trainer.learner).values():
        for entry in optimizer.state.values():
            assert entry["exp_avg"].dtype == entry["exp_avg_sq"].dtype == torch.float32


def test_the_same_seed_is_the_same_run_and_another_seed_is_not(tmp_path: Path) -> None:
    one, two = one_iteration(tmp_path / "1"), one_iteration(tmp_path / "2")
    assert all(torch.equal(tensor, weights(two)[name]) for name, tensor in weights(one).items())
    other = one_iteration(tmp_path / "3", run={"iterations": 1, "seed": 1})
    assert any(not torch.equal(tensor, weights(other)[name]) for name, tensor in weights(one).items())


@pytest.mark.parametrize("name", ["collm-cc", "magrpo"])
def test_micro_batches_change_memory_and_not_the_update(tmp_path: Path, name: str) -> None:
    """A budget of 300 tokens cuts the iteration into dozens of passes; gradients agree to rounding.

    Compared before Adam's division, which turns rounding around zero into full steps: the norm of every gradient.
    """
    runs = [
        one_iteration(tmp_path / str(budget), name=name, learner={"micro_batch_tokens": budget, "lr": 1e-3})
        for budget in (300, 1 << 20)
    ]
    small, large = (read_metrics(run.folder / "metrics.jsonl")[-1] for run in runs)
    assert small.keys() == large.keys()
    compared = [key for key in small if key.endswith(("gradient_norm", "loss", "tokens/policy", "entropy_estimate"))]
    assert len(compared) > 5
    for key in compared:
        assert small[key] == pytest.approx(large[key], rel=1e-4, abs=1e-6), key


def test_a_reward_that_is_not_finite_fails_its_episodes_and_not_the_run(tmp_path: Path) -> None:
    settings = {"run": {"folder": str(tmp_path), "threads": 1, "iterations": 2}, "env": {"name": "test_numbers:Broken"}}
    trainer = Trainer(parse_config({**settings, "rollout": {"tasks": 2}, "evaluation": {"every": 0}}), quiet=True)
    lines = read_metrics(trainer.run() / "metrics.jsonl")
    assert [line["episodes_failed"] for line in lines[1:]] == [1, 1]
    [failed] = [
        record["failure"]
        for record in map(json.loads, (trainer.folder / "episodes" / "000001.jsonl").read_text().splitlines())
        if record["failure"]
    ]
    assert "reward is inf, not a finite number" in failed


def test_an_iteration_without_an_episode_stops_with_the_reason(tmp_path: Path) -> None:
    settings = {"run": {"folder": str(tmp_path), "threads": 1}, "env": {"name": "test_numbers:Broken"}, "rollout": {"tasks": 1}}
    trainer = Trainer(parse_config({**settings, "evaluation": {"every": 0}}), quiet=True)
    with pytest.raises(TrainingError, match=r"iteration \d: every episode failed: step 1: .*not a finite number"):
        trainer.run()


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, run={"iterations": 2})
    head = learners.value_heads(trainer.learner)["team"]
    with torch.no_grad():
        head.bias.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    with pytest.raises(TrainingError, match=r"iteration 0: .*advantage.*episode 0 \(task agree, agents agent_0, agent_1\)"):
        trainer.run()
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]) or "bias" in name


def test_warm_up_of_a_value_head_leaves_its_policy_as_it_is(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "collm-dc", 2, 0, critic={"body": "policy", "warmup": 1, "epochs": 3})
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    metrics = trainer.learner.update(trainer.collect(), iteration=0).metrics
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {"weight", "bias"}
    assert len(moved) == 4  # two heads of two tensors
    assert metrics["agent_0/critic/loss"] > 0
    assert "agent_0/entropy_estimate" not in metrics
    trainer.learner.update(trainer.collect(), iteration=1)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert len(moved) > 4


def test_metrics_carry_the_agents_name_and_nothing_is_overwritten(tmp_path: Path) -> None:
    dc = one_iteration(tmp_path, name="collm-dc")
    lines = (dc.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1]
    record = json.loads(lines[-1])
    for agent in ("agent_0", "agent_1"):
        for what in ("loss", "gradient_norm", "critic/loss", "critic/gradient_norm", "critic/explained_variance_turn_1"):
            assert f"{agent}/{what}" in record
    assert record["agent_0/critic/gradient_norm"] != record["agent_1/critic/gradient_norm"]


def test_explained_variance_is_taken_before_the_critic_sees_the_episodes(tmp_path: Path) -> None:
    """With a critic trained for many passes on one batch, the logged number is still the one of the untrained critic."""
    many = one_iteration(tmp_path / "many", critic={"epochs": 12, "lr": 3e-3})
    none = one_iteration(tmp_path / "none", critic={"epochs": 1, "lr": 1e-9})
    key = "critic/explained_variance_turn_0"
    first, second = (read_metrics(run.folder / "metrics.jsonl")[-1][key] for run in (many, none))
    assert isinstance(first, float)
    assert first == second


def test_warm_up_trains_the_critic_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, critic={"warmup": 1})
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    trainer.learner.update(trainer.collect(), iteration=0)
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved
    assert all(name.startswith("critic-team.") for name in moved)
    trainer.learner.update(trainer.collect(), iteration=1)
    assert any(not torch.equal(t, before[name]) for name, t in weights(trainer).items() if name.startswith("agent_1."))
