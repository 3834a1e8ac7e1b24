"""Every algorithm solves the toy world: from at most 0.4 to at least 0.9 of the optimum on `agree` with four colours."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from learners import optimizers

from collm import seeds
from collm.learning import learner
from collm.learning.credit import Assignment
from collm.learning.learner import Update
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.rollout.collect import collect
from collm.runs.log import read_metrics
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Group

MONTE_CARLO = ("magrpo", "marloo", "maremax", "mareinforce", "grpo")


def make_trainer(folder: Path, name: str, agents: int, seed: int, **changes: dict[str, Any]) -> Trainer:
    """64 joint samples an iteration: 16 groups of 4, or 64 single episodes under a critic."""
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "seed": seed, "iterations": 60, "threads": 1, "folder": str(folder), "trackers": []},
        "env": {"name": "agree", "wording": "terse", "agents": agents},
        "rollout": {"tasks": 16 if name in MONTE_CARLO else 64, "max_tokens": 4},
        "algorithm": {"name": name},
        "learner": {"lr": 5e-4},
        "critic": {"lr": 5e-4},
        "evaluation": {"every": 0},
    }
    if "name" in changes.get("env", {}):
        values["env"].pop("wording")  # other environments have no such option
    for room, settings in changes.items():
        former = {} if room == "env" and "name" in settings else values.get(room, {})
        values[room] = {**former, **settings}
    return Trainer(parse_config(values), quiet=True)


def score(trainer: Trainer, episodes: int = 256) -> float:
    """Share of the optimum: mean reward per turn of sampled play."""
    plan = replace(trainer.plan, group_size=1, tree=False, resamples=0, no_op=False)
    tasks = [index % len(trainer.tasks) for index in range(episodes)]
    return reward_per_turn(collect(plan, trainer.engine, tasks, [seeds.derive("score", index) for index in range(episodes)]))


def reward_per_turn(groups: list[Group]) -> float:
    played = [episode for group in groups for episode in group.episodes]
    return sum(turn.raw_reward for e in played for turn in e.turns) / sum(len(e.turns) for e in played)


def end_when_solved(trainer: Trainer, *, level: float = 0.95, window: int = 3) -> None:
    """Makes the iteration the last one at which `window` iterations in a row have earned `level` of the optimum on average."""
    update = trainer.learner.update
    recent: deque[float] = deque(maxlen=window)

    def watched(groups: list[Group], iteration: int) -> Update:
        recent.append(reward_per_turn(groups))
        if len(recent) == window and sum(recent) >= level * window:
            run = trainer.config.run.model_copy(update={"iterations": iteration + 1})
            trainer.config = trainer.config.model_copy(update={"run": run})
        return update(groups, iteration)

    trainer.learner.update = watched  # type: ignore[method-assign]


def solves(trainer: Trainer) -> None:
    """Trains until the task is solved, or to the last iteration; sampled play before and after is what is judged."""
    before = score(trainer)
    assert before <= 0.4
    end_when_solved(trainer)
    trainer.run()
    after = score(trainer)
    told = f"{trainer.config.algorithm.name} {trainer.team.agents} seed {trainer.config.run.seed}"
    print(f"{told}: {before:.2f} -> {after:.2f} in {trainer.iteration} iterations")
    assert after >= 0.9


@pytest.mark.parametrize("name", ["collm-cc", "magrpo"])
def test_two_agents_agree(tmp_path: Path, name: str) -> None:
    solves(make_trainer(tmp_path, name, 2, 0, run={"iterations": 30}))


@pytest.mark.slow
@pytest.mark.parametrize(("agents", "seed"), [(2, 0), (3, 1)])
@pytest.mark.parametrize("name", ["collm-cc", "collm-dc", "magrpo", "marloo", "maremax", "mareinforce"])
def test_every_algorithm_agrees(tmp_path: Path, name: str, agents: int, seed: int) -> None:
    changes: dict[str, dict[str, Any]] = {}
    if name == "maremax":  # a group of four seldom holds a success, and its best is then a failure (docs/log.md)
        changes = {"algorithm": {"group_size": 16}, "rollout": {"tasks": 8}, "learner": {"lr": 3e-4}}
    solves(make_trainer(tmp_path, name, agents, seed, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["ac", "grpo"])
def test_one_agent_names_the_stated_target(tmp_path: Path, name: str, seed: int) -> None:
    solves(make_trainer(tmp_path, name, 1, seed, learner={"lr": 3e-4}, critic={"lr": 3e-4}, run={"iterations": 100}))


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "own critic as a value head": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy"}},
    "no text critic": {"critic": {"body": "none"}},
    "no text critic, rewards alone": {"critic": {"body": "none", "metrics": False}, "algorithm": {"teammates": "replay"}},
    "no text critic, three turns": {
        "critic": {"body": "none"},
        "env": {"turns": 3},
        "rollout": {"tasks": 24},
        "learner": {"lr": 2e-4},
    },
    "Q with a counterfactual baseline": {  # without warm-up its first guesses push both agents out of the valid answers
        "algorithm": {"baseline": "counterfactual"},
        "critic": {"warmup": 5},
        "learner": {"lr": 1e-4},
    },
    "own Q": {
        "algorithm": {"name": "collm-dc", "baseline": "counterfactual"},
        "learner": {"lr": 1e-4},
    },
    "TD(lambda), three turns": {
        "algorithm": {"lam": 0.9, "teammates": "none"},
        "critic": {"body": "auto"},
        "env": {"turns": 3},
        "rollout": {"tasks": 24},
    },
    "difference baseline, three turns": {
        "critic": {"body": "auto"},
        "env": {"turns": 3},
        "rollout": {"tasks": 24},
        "learner": {"lr": 2e-4},
    },
    "TD error, three turns": {
        "algorithm": {"lam": 0.0, "teammates": "none"},
        "critic": {"body": "auto", "lam": 0.0},
        "env": {"turns": 3},
        "rollout": {"tasks": 24},
        "learner": {"lr": 2e-4},
    },
    "difference baseline of MAGRPO": {"algorithm": {"name": "magrpo", "teammates": "replay"}},
    "difference baseline of MAGRPO, three turns": {
        "algorithm": {"name": "magrpo", "teammates": "replay"},
        "env": {"turns": 3},
        "rollout": {"tasks": 8},
    },
    "turn tree": {"algorithm": {"name": "magrpo", "tree": True, "group_size": 3}, "env": {"turns": 3}, "rollout": {"tasks": 2}},
    "ratio per token": {"algorithm": {"loss": "ppo_clip", "epochs": 3}, "learner": {"lr": 2e-4}},
    "ratio per answer": {"algorithm": {"loss": "sequence_clip", "epochs": 3, "normalize": "agent"}},
    "group deviation": {"algorithm": {"name": "magrpo", "normalize": "group"}, "rollout": {"tasks": 16}},
    "everything on": {
        "algorithm": {"kl_coef": 0.001, "normalize": "agent", "lam": 0.5},
        "critic": {"body": "auto", "lam": 0.5, "warmup": 3, "epochs": 2, "normalize_targets": True, "state": True},
        "env": {"turns": 2},
        "rollout": {"tasks": 32},
        "learner": {"lr": 2e-4},
    },
    "a fresh prompt each turn": {"env": {"turns": 3}, "rollout": {"history": "last", "tasks": 24}, "learner": {"lr": 2e-4}},
    "one set of weights for all": {"team": {"shared": True}, "learner": {"lr": 2e-4}},
    "a small support": {"rollout": {"temperature": 0.9, "top_p": 0.95, "top_k": 20}},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_switch_still_agrees(tmp_path: Path, variant: str) -> None:
    changes = VARIANTS[variant]
    name = changes.get("algorithm", {}).get("name", "collm-cc")
    solves(make_trainer(tmp_path, name, 2, 0, **{"run": {"iterations": 60}, **changes}))


@pytest.mark.parametrize("agents", [2, 3, 5])
def test_tokens_grow_with_agents_and_critic_steps_do_not(tmp_path: Path, monkeypatch, agents: int) -> None:
    """Policy tokens per joint action with N agents are at most N times those with one; the critic takes one step always.

    (An answer that is the end mark alone saves the template its own. Each sequence is read by itself here.)
    """
    monkeypatch.setattr(Policy, "reads_trees", False)
    monkeypatch.setattr(Critic, "reads_trees", False)
    records = {}
    for number in (1, agents):
        changes = {"run": {"iterations": 1}, "env": {"name": "worlds:Echo", "agents": number}, "critic": {"body": "auto"}}
        trainer = make_trainer(tmp_path / str(number), "collm-cc", number, 0, rollout={"max_tokens": 1}, **changes)
        steps = count_steps(trainer)
        trainer.run()
        records[number] = read_metrics(trainer.folder / "metrics.jsonl")[-1]
        assert steps == {"critic-team": 1, **{agent: 1 for agent in trainer.team.agents}}
    for key in ("tokens/policy", "tokens/prompt", "tokens/sampled"):
        assert 0.99 * agents * records[1][key] <= records[agents][key] <= agents * records[1][key]
    assert records[agents]["joint_actions"] == records[1]["joint_actions"] == 128
    assert records[agents]["tokens/critic"] > 0


def count_steps(trainer: Trainer) -> dict[str, int]:
    steps = dict.fromkeys(optimizers(trainer.learner), 0)
    for name, optimizer in optimizers(trainer.learner).items():

        def count(*_: Any, name: str = name) -> None:
            steps[name] += 1

        optimizer.register_step_post_hook(count)
    return steps


def test_the_wrong_variant_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With advantages of the wrong sign the same recipe unlearns, in more iterations than it takes to learn: the test above can
    fail."""
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, run={"iterations": 10})
    assign = learner.assign_values

    def wrong(*arguments: Any, **options: Any) -> Assignment:
        assigned = assign(*arguments, **options)
        return replace(assigned, credit=replace(assigned.credit, advantages_ENT=-assigned.credit.advantages_ENT))

    monkeypatch.setattr(learner, "assign_values", wrong)
    trainer.run()
    assert score(trainer) < 0.4
