"""The process of one run of a study."""

from __future__ import annotations

from pathlib import Path

from collm.runs.directory import begin, read_config
from collm.settings.load import parse_config
from collm.settings.rooms import Config
from collm.training.cell import train


def config_of(folder: Path, trackers: list[str]) -> Config:
    run = {"folder": str(folder), "name": "run", "iterations": 1, "threads": 1, "device": "cpu", "trackers": trackers}
    return parse_config(
        {
            "env": {"name": "agree", "turns": 1, "wording": "terse"},
            "run": run,
            "rollout": {"tasks": 1, "max_tokens": 2},
            "evaluation": {"every": 0},
            "critic": {"body": "none"},
        }
    )


def test_an_interrupted_run_has_the_trackers_that_the_recipe_names_now(tmp_path: Path) -> None:
    run = tmp_path / "run"
    begin(run, config_of(tmp_path, ["tensorboard"]))
    train(config_of(tmp_path, []), run, judged=0)
    assert (run / "final").is_dir()
    assert read_config(run).run.trackers == []
    assert not (run / "tensorboard").exists()
