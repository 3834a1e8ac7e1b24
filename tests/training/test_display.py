"""What a person sees of a run: phases, time left, and the first seconds."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import collm

from collm.training.display import Display

AGREE = '[env]\nname = "agree"\n[rollout]\ntasks = 4\nmax_tokens = 4\n[run]\nthreads = 1\n[evaluation]\nevery = 2\n'


def test_time_left_is_that_of_iterations_and_of_evaluations_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of 100 s, then iterations of 10 s; evaluations are due after 2, 4 and 5 of 5."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(5, evaluate_every=2, quiet=True)
    now[0] = 100.0
    display.update(0, {"seconds/evaluation": 100.0})
    assert display.seconds_left(0) is None
    now[0] = 110.0
    display.update(1, {})
    assert display.seconds_left(1) == pytest.approx(4 * 10 + 3 * 100)
    now[0] = 160.0
    display.update(2, {"seconds/evaluation": 40.0})
    assert display.seconds_left(2) == pytest.approx(3 * 10 + 2 * 40)


def test_a_resumed_run_counts_its_own_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(10, done=8, quiet=True)
    assert display.seconds_left(8) is None
    now[0] = 6.0
    assert display.seconds_left(9) == pytest.approx(6.0)


def test_in_a_pipe_each_phase_has_a_line_and_later_ones_are_sparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Engine:
        watch: Any = None

    now, engine = [0.0], Engine()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    display = Display(5)
    for _ in range(3):
        with display.phase("collecting", engine, of=1):
            now[0] += 1.0
            engine.watch(2, 8)
        assert engine.watch is None
        with display.phase("learning", of=1):
            now[0] += 1.0
    assert capsys.readouterr().err.splitlines() == ["iteration 1/5: collecting", "iteration 1/5: learning"]
    with display.phase("evaluating", engine):
        now[0] += 31.0
        engine.watch(12, 40)
        engine.watch(13, 40)
    assert capsys.readouterr().err.splitlines() == ["evaluating", "evaluating, 12/40 answers"]


def test_a_run_in_a_pipe_names_its_phases_in_order(tmp_path: Path) -> None:
    recipe = tmp_path / "agree.toml"
    recipe.write_text(AGREE)
    process = collm("train", str(recipe), "--run.folder", str(tmp_path), "--run.iterations", "2")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    wanted = (
        "loading tiny",
        "learning rates",
        "evaluating",
        "held-out after 0",
        "1/2: collecting",
        "1/2: learning",
        "2/2  reward",
    )
    places = [re.search(re.escape(text), err) for text in wanted]
    assert all(places), err
    starts = [place.start() for place in places if place]
    assert starts == sorted(starts), err
    assert "min left" in err
