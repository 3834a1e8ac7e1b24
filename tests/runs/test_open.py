"""`collm.open_run`: in a Python session a run's team answers a prompt, metrics are a list of dicts, and episodes iterate."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import collm
from collm.cli.main import main
from collm.errors import ConfigError, EngineError, RunError
from collm.runs.open import Run
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Message, Sampling

SETTINGS: dict[str, Any] = {
    "run": {"name": "small", "iterations": 2, "threads": 1, "trackers": [], "checkpoint_every": 1},
    "env": {"name": "str_build", "wording": "terse", "strings": ["IL", "CM", "LI"], "eval_strings": ["MI", "LC"], "turns": 2},
    "rollout": {"tasks": 3, "max_tokens": 16},
    "algorithm": {"name": "collm-cc"},
    "learner": {"lr": 1e-3},
    "evaluation": {"every": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = {**SETTINGS["run"], "folder": str(tmp_path_factory.mktemp("runs"))}
    return Trainer(parse_config({**SETTINGS, "run": run}), quiet=True).run()


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return collm.open_run(folder)


def test_metrics_are_a_list_of_dicts(run: Run) -> None:
    assert [record["iteration"] for record in run.metrics] == [0, 1, 2]
    assert all(type(record) is dict for record in run.metrics)
    assert run.metrics[-1]["joint_actions"] == run.cost()["joint_actions"] == 12
    assert (run.config["env"]["name"], run.name, run.planned, run.checkpoints) == ("str_build", "small", 2, [1, 2])
    assert repr(run) == f"<Run {str(run.folder)!r}: str_build, collm-cc>"


def test_episodes_iterate(run: Run) -> None:
    assert [(episode["iteration"], len(episode["turns"])) for episode in run.episodes()] == [(1, 2)] * 3 + [(2, 2)] * 3
    held_out = [(episode["iteration"], episode["label"]) for episode in run.episodes(evaluation=True)]
    assert held_out == [(number, word) for number in (0, 1, 2) for word in ("MI", "LC")]
    assert [episode["iteration"] for episode in run.episodes(2)] == [2, 2, 2]
    assert [episode["label"] for episode in run.episodes(0, evaluation=True)] == ["MI", "LC"]
    with pytest.raises(RunError, match=r"kept no training episodes of iteration 0; kept: 1, 2\. Choose one of these"):
        run.episodes(0)
    with pytest.raises(RunError, match="kept no held-out evaluation after iteration 7; kept: 0, 1, 2"):
        run.episodes(7, evaluation=True)


@pytest.mark.parametrize(("checkpoint", "iteration"), [("final", 2), (2, 2), (1, 1), ("start", 0)])
def test_the_team_answers_a_prompt_as_it_did_in_its_evaluation(run: Run, checkpoint: str | int, iteration: int) -> None:
    for episode in run.episodes(iteration, evaluation=True):
        for agent, answer in episode["turns"][0]["agents"].items():
            assert run.answer(agent, answer["read"], checkpoint=checkpoint) == answer["wrote"]


def test_a_chat_a_distribution_and_a_seed(run: Run) -> None:
    chat = (Message("user", "Name one colour."), Message("assistant", "red"), Message("user", "Another."))
    warm = Sampling(temperature=1.0, max_tokens=6)
    assert run.answer("builder_1", chat) == run.answer("builder_1", chat)
    assert len({run.answer("builder_1", chat, sampling=warm, seed=seed) for seed in range(8)}) > 1
    assert run.answer("builder_1", chat, sampling=warm, seed=3) == run.answer("builder_1", chat, sampling=warm, seed=3)
    with pytest.raises(EngineError, match=r"builder_1 cannot answer: a history of .* exceed the model's 4096 positions"):
        run.answer("builder_1", "word " * 5000)
    with pytest.raises(ConfigError, match="no agent 'builder_7' in this run; its agents are builder_0, builder_1"):
        run.answer("builder_7", "Name one colour.")


def tensors(team: collm.Team, agent: str) -> dict[str, torch.Tensor]:
    return team.policies[agent].model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_which_weights_a_team_has(run: Run) -> None:
    final, last, first = run.team(), run.team(2), run.team("1")
    assert final.agents == ("builder_0", "builder_1")
    for agent in final.agents:
        assert equal(tensors(final, agent), tensors(last, agent))
        assert not equal(tensors(final, agent), tensors(first, agent))
    best = max((0, 1, 2), key=lambda i: run.metrics[i]["evaluation/reward"])
    assert equal(tensors(run.team("best"), "builder_0"), tensors(run.team(best), "builder_0"))


def test_an_export_is_an_ordinary_folder_for_one_agent_or_all(run: Run, tmp_path: Path) -> None:
    one = run.export(tmp_path / "one", "builder_0")
    everyone = run.export(str(tmp_path / "all"))
    assert sorted(path.name for path in everyone.iterdir()) == ["builder_0", "builder_1"]
    first = run.export(tmp_path / "first", "builder_0", checkpoint=1)
    assert main(["export", str(run.folder), str(tmp_path / "command"), "--agent", "builder_0"]) == 0
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    for other in (everyone / "builder_0", tmp_path / "command"):
        assert {path.name: path.read_bytes() for path in other.iterdir()} == files
    assert files["model.safetensors"] != (first / "model.safetensors").read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).state_dict()
    assert equal(loaded, tensors(run.team(), "builder_0"))
    with pytest.raises(RunError, match="exists already; name a folder that does not"):
        run.export(one)
    with pytest.raises(ConfigError, match="no agent 'builder_7'"):
        run.export(tmp_path / "nobody", "builder_7")
    assert not (tmp_path / "nobody").exists()


def test_a_folder_that_is_not_a_run_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, message in (
        ("absent", "is not a run directory: the folder does not exist"),
        ("file", "is not a run directory: it is not a folder"),
        ("empty", "is not a run directory: it holds no config.json, so no run has begun there. Start one with `collm train"),
    ):
        with pytest.raises(RunError, match=message):
            collm.open_run(str(tmp_path / name))


def damaged(folder: Path, copy: Path, harm: Callable[[Path], None]) -> Run:
    shutil.copytree(folder, copy)
    harm(copy)
    return collm.open_run(copy)


def test_missing_weights_are_named_with_the_way_out(folder: Path, run: Run, tmp_path: Path) -> None:
    for checkpoint, kind, message in (
        (9, RunError, r"no checkpoint after 9 iterations; saved: 1, 2\. Name one of these, or final"),
        ("newest", ConfigError, r"'newest' is not final, best, start, or a number of iterations \(saved: 1, 2\)"),
    ):
        with pytest.raises(kind, match=message):
            run.team(checkpoint)
    unfinished = damaged(folder, tmp_path / "unfinished", lambda copy: shutil.rmtree(copy / "final"))
    with pytest.raises(RunError, match="has no final weights yet: finish it with `collm train --resume"):
        unfinished.team()
    assert equal(tensors(unfinished.team(1), "builder_1"), tensors(run.team(1), "builder_1"))
    gone = damaged(folder, tmp_path / "gone", lambda copy: (copy / "final" / "builder_1" / "config.json").unlink())
    with pytest.raises(RunError, match=r"final' cannot be read: it lacks builder_1/config\.json"):
        gone.team()


def foreign(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    settings["env"] = {"name": "no_such_module:Env"}
    (copy / "config.json").write_text(json.dumps(settings))


def test_a_team_needs_no_environment_of_a_stranger(folder: Path, tmp_path: Path) -> None:
    """The files of weights tell the agents; where there are none, the environment is asked, which must be named again."""
    run = damaged(folder, tmp_path / "foreign", foreign)
    for checkpoint in ("final", 1, "start"):
        assert run.team(checkpoint).agents == ("builder_0", "builder_1")
    shutil.rmtree(run.folder / "final")
    assert run.team("start").agents == ("builder_0", "builder_1")
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(RunError, match="it is Python code, and a run folder may come from elsewhere"):
        run.team("start")
    named = collm.open_run(run.folder, overrides={"env.name": "str_build"})
    assert named.team("start").agents == ("builder_0", "builder_1")


def test_settings_of_a_loaded_team_are_those_that_evaluation_may_change(folder: Path) -> None:
    assert collm.open_run(folder, overrides={"team.compute": "bfloat16"}).team().policies["builder_0"].compute == "bfloat16"
    with pytest.raises(ConfigError, match=r"'learner.lr' is not a setting that the evaluation of a trained run can change"):
        collm.open_run(folder, overrides={"learner.lr": 1.0}).team()
    with pytest.raises(ConfigError, match=r"run\.device='cuda:99'"):
        collm.open_run(folder, overrides={"run.device": "cuda:99"}).team()


def test_agents_that_share_weights_are_all_in_the_team(tmp_path: Path) -> None:
    own = {"run": {**SETTINGS["run"], "folder": str(tmp_path), "iterations": 1}, "team": {"shared": True}}
    run = collm.open_run(Trainer(parse_config({**SETTINGS, **own}), quiet=True).run())
    assert run.team(1).agents == run.team().agents == ("builder_0", "builder_1")
    shutil.rmtree(run.folder / "final")  # a checkpoint names the first of them alone
    assert run.team(1).agents == ("builder_0", "builder_1")


def test_reading_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys, collm; run = collm.open_run(sys.argv[1])\n"
        "assert len(run.metrics) == 3 and len(list(run.episodes(evaluation=True))) == 6 and run.checkpoints and run.cost()\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
