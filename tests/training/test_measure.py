"""`collm plan --measure`: hours from two timed steps, by hand; smaller steps where a whole one takes too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from collm.cli.main import main
from collm.settings.load import parse_config
from collm.training import measure as module
from collm.training.measure import Measured, Step, measure

AGREE: dict[str, Any] = {
    "env": {"name": "agree", "wording": "terse"},
    "rollout": {"tasks": 16, "max_tokens": 2},
    "run": {"iterations": 7, "threads": 1, "device": "cpu"},
    "evaluation": {"every": 3, "episodes": 2},
}


def test_hours_by_hand() -> None:
    """Steps of 2 of 8 tasks, 6 s and 10 s: 32 s an iteration; episodes of 0.5 s, so 20 held-out ones take 10 s."""
    found = Measured((Step(2, 4, 6), Step(4, 6, 6)), 2, 8, iterations=100, evaluations=4, held_out=20)
    assert found.iteration == 32
    assert found.evaluation == 10
    assert found.hours == pytest.approx((100 * 32 + 4 * 10) / 3600)
    assert found.error == 0.5
    assert "54.0 minutes for 100 iterations of 32.0 s (scaled from 2 of 8 tasks) and 4 evaluations of about 10.0 s" in (
        found.sentences()
    )
    assert "differ by 50%" in found.sentences()


@pytest.mark.parametrize(("patience", "played"), [(1e9, 16), (0.0, 2)])
def test_steps_of_the_recipes_size_or_smaller(monkeypatch: pytest.MonkeyPatch, patience: float, played: int) -> None:
    monkeypatch.setattr(module, "PATIENCE", patience)
    found = measure(parse_config(AGREE))
    assert (found.played, found.tasks, found.iterations) == (played, 16, 7)
    assert (found.evaluations, found.held_out) == (4, 2)  # the one held-out task, twice; after 0, 3, 6 and 7
    assert [step.episodes for step in found.steps] == [played, played]
    assert all(step.collect > 0 and step.learn > 0 for step in found.steps)


def test_the_command_prints_it_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "agree.toml"
    recipe.write_text('[env]\nname = "agree"\n[rollout]\ntasks = 2\nmax_tokens = 2\n[run]\nthreads = 1\n')
    words = ["plan", str(recipe), "--run.folder", str(tmp_path / "runs"), "--measure"]
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["measured"]["hours"] > 0
    assert record["measured"]["tasks_played"] == record["measured"]["tasks"] == 2
    assert main([*words, "--memory", "1MB"]) == 1
    assert "Nothing was measured, since it does not fit." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["agree.toml"]
