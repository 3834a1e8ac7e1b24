"""Runs of a version whose settings had other names open, evaluate, export and resume.

runs-of-before.tar.xz holds two runs of one recipe (adapters of rank 1 on `agree`, two turns, critic.difference = true): `whole`
ended after 4 iterations, `before` was stopped by a signal after 2.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from fingerprints import machine
from safetensors.torch import load_file

from collm import open_run
from collm.cli.main import main
from collm.errors import ConfigError
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.settings.former import translate
from collm.training.trainer import Trainer

MADE_ON = "AMD EPYC 25 17 1, flags 6a93d771, torch 2.13.0+cpu"
"""The machine of both runs; bits differ between processors."""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("runs-of-before.tar.xz")) as packed:
        packed.extractall(tmp_path, filter="data")
    return tmp_path


def test_it_opens(runs: Path) -> None:
    run = open_run(runs / "whole")
    assert run.config["algorithm"]["baseline"] == "value"
    assert run.config["algorithm"]["teammates"] == "replay"
    assert run.config["critic"]["lam"] == 0.9
    assert [record["iteration"] for record in run.metrics] == [0, 1, 2, 3, 4]
    assert len(list(run.episodes(evaluation=True))) == 3
    assert run.team().agents == ("agent_0", "agent_1")


@pytest.mark.parametrize(("before", "now"), [(True, ["tensorboard"]), (False, [])])
def test_tensorboard_is_one_of_the_trackers(before: bool, now: list[str]) -> None:
    assert translate({"run": {"seed": 3, "tensorboard": before}}) == {"run": {"seed": 3, "trackers": now}}
    assert translate({"run": {"seed": 3, "trackers": ["wandb"]}}) == {"run": {"seed": 3, "trackers": ["wandb"]}}


def test_it_evaluates_and_exports(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(runs / "whole"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 4  # of one task
    assert main(["export", str(runs / "whole"), "--agent", "agent_0", str(runs / "exported"), "--merged"]) == 0
    assert (runs / "exported" / "model.safetensors").is_file()


def test_it_resumes_and_on_the_same_machine_ends_as_it_would_have(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit if each sequence is read by itself, as it was then: tasks that share a row round otherwise."""
    monkeypatch.setattr(Policy, "reads_trees", False)
    monkeypatch.setattr(Critic, "reads_trees", False)
    Trainer.resume(runs / "before", quiet=True).run()
    assert open_run(runs / "before").metrics[-1]["iteration"] == 4
    names = sorted(path.name for path in (runs / "whole" / "checkpoints" / "000004").glob("*.safetensors"))
    assert sorted(path.name for path in (runs / "before" / "checkpoints" / "000004").glob("*.safetensors")) == names
    if machine() == MADE_ON:
        for name in names:
            ours, theirs = (load_file(runs / run / "checkpoints" / "000004" / name) for run in ("before", "whole"))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name


def test_one_that_learned_with_what_is_gone_is_not_resumed(runs: Path) -> None:
    path = runs / "before" / "config.json"
    settings = json.loads(path.read_text())
    settings["learner"]["weight_decay"] = 0.1
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"began with learner\.weight_decay=0\.1, which this version of collm does not have"):
        Trainer.resume(runs / "before", quiet=True)
    assert open_run(runs / "before").team(2).agents == ("agent_0", "agent_1")
