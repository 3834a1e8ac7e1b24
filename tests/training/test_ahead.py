"""Iterations whose episodes are played before the update of the iteration before (`rollout.ahead`)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_resume import outcome

from collm.errors import ConfigError
from collm.rollout.collector import LocalCollector
from collm.rollout.plan import Plan
from collm.settings.load import parse_config
from collm.settings.rooms import Config
from collm.training.signals import Interrupted
from collm.training.trainer import Trainer
from collm.types import Group


def config_of(folder: Path, *, ahead: int = 1, **algorithm: Any) -> Config:
    return parse_config(
        {
            "run": {"folder": str(folder), "name": "run", "iterations": 4, "threads": 1, "trackers": []},
            "env": {"name": "agree", "wording": "terse", "turns": 2},
            "rollout": {"tasks": 12, "max_tokens": 4, "ahead": ahead},
            "algorithm": {"name": "collm-cc", "loss": "ppo_clip", **algorithm},
            "learner": {"lr": 1e-3},
            "critic": {"body": "auto", "lr": 1e-3},
            "evaluation": {"every": 2, "episodes": 2},
        }
    )


class Watched(LocalCollector):
    """Notes the weights that play each iteration, and is stopped before it plays `stop_at`."""

    def __init__(self, engine: Any, team: Any, stop_at: int | None = None):
        super().__init__(engine)
        self.team, self.stop_at = team, stop_at
        self.played: list[tuple[str, int, str]] = []

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int = 0) -> list[Group]:
        if plan.split == "train" and iteration == self.stop_at:
            raise Interrupted(15)
        self.played.append((plan.split, iteration, self.weights()))
        return super().play(plan, tasks, keys, iteration)

    def weights(self) -> str:
        found = hashlib.sha256()
        for parameter in self.team.policies["agent_0"].body.parameters():
            found.update(parameter.detach().numpy().tobytes())
        return found.hexdigest()


def watched(config: Config) -> tuple[Trainer, Watched]:
    trainer = Trainer(config, quiet=True)
    trainer.collector = Watched(trainer.engine, trainer.team)
    return trainer, trainer.collector


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_iteration_is_played_with_the_weights_of_one_update_before(tmp_path: Path, ahead: int) -> None:
    trainer, collector = watched(config_of(tmp_path, ahead=ahead))
    trainer.run()
    weights = [weight for split, _, weight in collector.played if split == "train"]
    assert [iteration for split, iteration, _ in collector.played if split == "train"] == [0, 1, 2, 3]
    assert len(set(weights)) == 4 - ahead
    assert (weights[0] == weights[1]) == bool(ahead)
    held_out = [weight for split, _, weight in collector.played if split == "eval"]  # before training, after 2 and 4 updates
    assert held_out[0] == weights[0]
    assert held_out[1] == weights[2 + ahead]
    assert held_out[2] == collector.weights()


def test_staleness_is_a_metric_and_no_fault_of_the_engine(tmp_path: Path) -> None:
    run = Trainer(config_of(tmp_path), quiet=True).run()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert lines[0]["agent_0/logprob_gap_mean"] < 1e-5  # the first iteration is played with the first weights
    assert all(line["agent_0/staleness_mean"] > 1e-4 for line in lines[1:])
    assert not any("staleness" in name for name in lines[0])
    assert not any("logprob_gap" in name for line in lines[1:] for name in line)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Trainer(config_of(tmp_path_factory.mktemp("whole")), quiet=True).run()


@pytest.mark.parametrize("stop_at", [0, 1, 2, 3])
def test_stopped_while_it_plays_a_resumed_run_is_the_same(tmp_path: Path, whole: Path, stop_at: int) -> None:
    trainer, collector = watched(config_of(tmp_path))
    collector.stop_at = stop_at
    with pytest.raises(Interrupted):
        trainer.run()
    newest = max((trainer.folder / "checkpoints").glob("[0-9]*"))
    assert (newest / "ahead.json").exists() == (stop_at > 1)
    resumed = Trainer.resume(trainer.folder, quiet=True)
    resumed.run()
    assert outcome(trainer.folder) == outcome(whole)


def test_stopped_while_it_learns_a_resumed_run_is_the_same(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config_of(tmp_path), quiet=True)
    update = trainer.learner.update

    def stopped(groups: list[Group], iteration: int) -> Any:
        done = update(groups, iteration)
        if iteration == 2:
            raise Interrupted(15)
        return done

    monkeypatch.setattr(trainer.learner, "update", stopped)
    with pytest.raises(Interrupted):
        trainer.run()
    Trainer.resume(trainer.folder, quiet=True).run()
    assert outcome(trainer.folder) == outcome(whole)


def test_a_damaged_file_of_episodes_is_named(tmp_path: Path) -> None:
    trainer, collector = watched(config_of(tmp_path))
    collector.stop_at = 3
    with pytest.raises(Interrupted):
        trainer.run()
    newest = max((trainer.folder / "checkpoints").glob("[0-9]*"))
    (newest / "ahead.json").write_text('[{"task": 1}]')
    with pytest.raises(Exception, match=r"cannot be read.*Remove that folder"):
        Trainer.resume(trainer.folder, quiet=True).run()


def test_a_loss_that_does_not_correct_for_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.ahead=1 .* algorithm\.loss='reinforce'.*ppo_clip"):
        config_of(tmp_path, loss="reinforce")
    assert config_of(tmp_path, loss="reinforce", ahead=0).rollout.ahead == 0
    assert config_of(tmp_path, name="magrpo", loss="sequence_clip").rollout.ahead == 1
