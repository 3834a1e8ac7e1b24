"""`collm.compare`: a comparison from Python has the numbers and leaves the files of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import collm
from collm.cli.main import main
from collm.errors import ConfigError, RunError
from collm.reports.grid import draw_study
from collm.studies.compare import schedule

RECIPE = """
[compare]
methods = ["parallel", "magrpo"]
seeds = [0]
[settings.run]
iterations = 1
threads = 1
trackers = []
[settings.evaluation]
every = 1
[settings.rollout]
tasks = 8
max_tokens = 4
[tasks.two]
env = {name = "agree"}
[methods.magrpo]
learner.lr = 1e-3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_the_numbers_and_the_files_of_the_command(tmp_path: Path, recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    grid = collm.compare(str(recipe), folder=folder, workers=2, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert (grid.tasks, sorted(grid.methods), grid.seeds, grid.missing, grid.failure) == (
        ["two"],
        ["magrpo", "parallel"],
        [0],
        0,
        "",
    )
    line = grid.line("two", "magrpo")
    assert line.seeds == [0]
    assert line.reward.mean == line.results[0].final["reward"] == line.results[0].rewards_K[-1]
    assert line.reward.low is None  # one seed
    assert json.loads((folder / "results.json").read_text()) == grid.plain()
    assert not (folder / "table.txt").exists()
    with pytest.raises(ConfigError, match="no run of 'collm-cc' on 'two' has finished; there are parallel, magrpo"):
        grid.line("two", "collm-cc")
    with pytest.raises(ConfigError, match="no run of 'magrpo' on 'three' has finished; tasks with finished runs: two"):
        grid.line("three", "magrpo")

    copy = tmp_path / "copy"
    assert grid.write(copy) == copy / "results.json"
    assert draw_study(grid, copy) == [copy / "curves-two.svg"]
    assert main(["compare", str(recipe), "--folder", str(folder), "--json"]) == 0
    told = capfd.readouterr()
    assert "2 runs, 2 of them already finished; 1 at a time" in told.err
    assert json.loads(told.out) == grid.plain()
    for name in ("results.json", "table.txt", "curves-two.svg"):
        assert (copy / name).read_bytes() == (folder / name).read_bytes()
    assert (folder / "recipe.toml").read_text() == RECIPE


def test_overrides_lie_beneath_the_methods_and_above_all_else(tmp_path: Path, recipe: Path) -> None:
    changes: dict[str, Any] = {"learner.lr": 0.5, "run.iterations": 7, "compare.seeds": [3, 4], "env.agents": 3}
    todo = schedule(recipe, folder=tmp_path / "out", overrides=changes, workers=5)
    assert todo.workers == 5
    assert [(job.cell.method, job.cell.seed) for job in todo.wanted] == [
        ("parallel", 3), ("magrpo", 3), ("parallel", 4), ("magrpo", 4),
    ]  # fmt: skip
    assert {job.config.run.iterations for job in todo.wanted} == {7}
    assert {job.config.env.options["agents"] for job in todo.wanted} == {3}
    assert {job.cell.method: job.config.learner.lr for job in todo.wanted} == {"parallel": 0.5, "magrpo": 1e-3}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run.seed": 3}, "run.seed differs from run to run of a comparison, so it cannot be overridden. Set compare.seeds."),
        ({"algorithm.name": "ac"}, "Set compare.methods."),
        ({"compare.seed": [1]}, "compare.seed: extra inputs"),
        ({"compare.seeds": []}, "compare.seeds: list should have at least 1 item"),
        ({"learner.rl": 1}, "Did you mean 'learner.lr'"),
        ({"run.folder": "x"}, "Choose the comparison's folder."),
    ],
)
def test_a_bad_override_is_refused_before_anything_starts(
    tmp_path: Path, recipe: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        collm.compare(recipe, folder=tmp_path / "out", overrides=changes)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_workers_is_refused(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare\.processes: input should be greater than or equal to 1"):
        collm.compare(recipe, folder=tmp_path / "out", workers=0)


def test_where_every_run_fails_that_is_an_error_and_where_some_do_it_is_told(tmp_path: Path, recipe: Path) -> None:
    (tmp_path / "empty").mkdir()
    recipe.write_text(RECIPE.replace("learner.lr = 1e-3", f'team.model = "{tmp_path / "empty"}"'))
    folder = tmp_path / "out"
    with pytest.raises(RunError, match=r"1 of 1 runs failed .* the first with: collm: "):
        collm.compare(recipe, folder=folder, only="*/magrpo*", quiet=True)
    grid = collm.compare(recipe, folder=folder, workers=2, quiet=True)
    assert grid.failure.startswith("1 of 2 runs failed and are missing from the results, the first with: collm: ")
    assert (grid.methods, grid.missing) == (["parallel"], 1)


def test_planning_and_reading_load_no_torch(tmp_path: Path, recipe: Path) -> None:
    code = (
        "import sys, collm; from collm.studies.compare import schedule\n"
        "assert len(schedule(sys.argv[1], folder=sys.argv[2]).waiting) == 2 and collm.compare\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
