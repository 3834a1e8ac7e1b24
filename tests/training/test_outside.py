"""A baseline, an engine and a learner from outside the package train without an edit in it (CONTRIBUTING.md)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import one_more, weights
from outside import LoggingEngine, ThreadHands
from test_learning import make_trainer

import collm
from collm.cli.main import main
from collm.engines.base import Engine
from collm.errors import ConfigError, RunError
from collm.learning.learner import Learner, PartsLearner
from collm.models.team import Team
from collm.runs.alarms import LARGE_GAP
from collm.runs.read import read_metrics
from collm.settings.load import parse_config
from collm.training.assemble import assemble, make_team, prepare
from collm.training.trainer import Trainer

BASELINE = {"name": "magrpo", "baseline": "outside:median"}


def config_of(folder: Path, **changes: Any) -> Any:
    values = {
        "run": {"name": "run", "folder": str(folder), "iterations": 3, "threads": 1, "trackers": []},
        "env": {"name": "agree", "wording": "terse"},
        "rollout": {"tasks": 8, "max_tokens": 4},
        "learner": {"lr": 1e-3},
        "evaluation": {"every": 0},
    }
    return parse_config({**values, **changes})


# --- a baseline ----------------------------------------------------------------------------------------------------------


def test_a_baseline_of_one_s_own_is_subtracted(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "magrpo", 2, 0, algorithm=BASELINE, rollout={"tasks": 4})
    batch, update = one_more(trainer)
    number = 0
    for group in batch.groups:
        returns = torch.tensor([episode.turns[0].reward for episode in group.episodes])
        for value in (returns - returns.quantile(0.5)).tolist():
            for agent in trainer.team.agents:
                assert update.annotations[number][0, agent].advantage == pytest.approx(value)
            number += 1


@pytest.mark.parametrize(
    ("baseline", "reason"),
    [
        ("nowhere:f", "cannot be loaded: No module named 'nowhere'"),
        ("outside:nothing", "cannot be loaded"),
        ("outside:unmarked", "is not a baseline: it must be a function with the annotation `-> Tensor`"),
        ("os:system", "is not a baseline"),
        ("outside:shapeless", r"returned a tensor of shape \(\) for returns of shape \(4, 2\)"),
        ("group_meen", r"Did you mean 'group_mean'\?"),
    ],
)
def test_what_is_not_a_baseline_is_refused_before_a_run_begins(tmp_path: Path, baseline: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make_trainer(tmp_path, "magrpo", 2, 0, algorithm={"name": "magrpo", "baseline": baseline})
    assert not list(tmp_path.rglob("config.json"))


# --- an engine -----------------------------------------------------------------------------------------------------------


def test_an_engine_of_one_s_own_is_loaded_rested_and_equal(tmp_path: Path) -> None:
    plain = Trainer(config_of(tmp_path / "plain"), quiet=True)
    plain.run()
    config = config_of(tmp_path / "own")
    team = make_team(prepare(config), ("agent_0", "agent_1"))
    engine = LoggingEngine(team)
    own: Engine = engine  # it has what the protocol asks for
    trainer = Trainer(config, team=team, engine=own, quiet=True)
    trainer.run()
    for name, tensor in weights(plain.learner).items():
        assert torch.equal(tensor, weights(trainer.learner)[name]), name
    assert engine.calls["load"] == engine.calls["rest"] == 3
    last = read_metrics(trainer.folder / "metrics.jsonl")[-1]
    assert last["agent_0/logprob_gap_max"] < 1e-4


def test_an_engine_that_holds_old_weights_shows_in_the_log_prob_gap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The wrong variant of the test above: `load` does nothing, which a run must not hide."""
    config = config_of(tmp_path)
    team = make_team(prepare(config), ("agent_0", "agent_1"))
    old = Team({agent: copy.deepcopy(policy) for agent, policy in team.policies.items()})
    trainer = Trainer(config, team=team, engine=LoggingEngine(old, stale=True))
    trainer.run()
    records = read_metrics(trainer.folder / "metrics.jsonl")
    assert records[1]["agent_0/logprob_gap_mean"] < 1e-4, "the first iteration is played with the first weights"
    assert records[3]["agent_0/logprob_gap_mean"] > LARGE_GAP
    assert "warning: the engine's log-probs of agent_0 differ from the learner's" in " ".join(capsys.readouterr().err.split())


# --- a learner elsewhere -------------------------------------------------------------------------------------------------


def elsewhere(config: Any, team: Team) -> PartsLearner:
    """The parts of an ordinary learner under other hands."""
    made = assemble(config, team=team).learner
    assert isinstance(made, PartsLearner)
    made.hands = ThreadHands(made.hands.parts)  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("name", ["collm-cc", "collm-dc", "magrpo"])
def test_parts_called_elsewhere_give_the_same_weights(tmp_path: Path, name: str) -> None:
    rooms = {"algorithm": {"name": name}, "critic": {"body": "auto"}}
    plain = Trainer(config_of(tmp_path / "plain", **rooms), quiet=True)
    plain.run()
    config = prepare(config_of(tmp_path / "elsewhere", **rooms))
    team = make_team(config, ("agent_0", "agent_1"))
    learner: Learner = elsewhere(config, team)
    trainer = Trainer(config, team=team, learner=learner, quiet=True)
    trainer.run()
    for key, tensor in weights(plain.learner).items():
        assert torch.equal(tensor, weights(trainer.learner)[key]), key


def test_a_run_s_own_baseline_must_be_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder may come from a stranger; what it names is Python code."""
    config = config_of(tmp_path, algorithm=BASELINE)
    Trainer(config, quiet=True).run()
    run = str(tmp_path / "run")
    assert main(["train", "--resume", run]) != 0
    assert "--algorithm.baseline outside:median" in capsys.readouterr().err
    assert main(["train", "--resume", run, "--algorithm.baseline", "outside:median"]) == 0
    assert main(["evaluate", run, "--json"]) == 0, "evaluation does not use the baseline"


def test_a_run_s_own_reader_of_texts_must_be_named_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    critic = {"body": "none", "metrics": "outside:length"}
    Trainer(config_of(tmp_path, algorithm={"name": "collm-dc"}, critic=critic), quiet=True).run()
    run = str(tmp_path / "run")
    assert main(["train", "--resume", run]) != 0
    assert "--critic.metrics outside:length" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"--critic\.metrics outside:length"):
        collm.fidelity(run, "start", answers=1)
    assert main(["train", "--resume", run, "--critic.metrics", "outside:length"]) == 0
