"""`collm compare`: formulas by hand, settings in layers, and a grid that starts again where it stopped."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from rich.console import Console
from test_reports import record, write_run

from collm.cli.main import main
from collm.errors import ConfigError, RunError
from collm.reports.grid import grid_tables
from collm.settings import former
from collm.settings.load import parse_config
from collm.settings.presets import ALGORITHMS
from collm.studies.grid import Study, read_grid
from collm.studies.jobs import digest
from collm.studies.recipe import read_plan
from collm.studies.result import Cell, area_under, first_reaching, read_result
from collm.training.task import metric_names

RECIPE = """
[compare]
methods = ["parallel", "magrpo", "collm-cc"]
seeds = [0, 1]
[compare.thresholds]
two = 0.9
[settings.run]
iterations = 2
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


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def test_area_by_hand() -> None:
    assert area_under([0, 10, 30], [0.0, 1.0, 2.0]) == pytest.approx((10 * 0.5 + 20 * 1.5) / 30)
    assert area_under([0], [0.25]) == 0.25
    assert area_under([0, 4, 8], [0.5, 0.5, 0.5]) == 0.5


def test_first_reaching_by_hand() -> None:
    assert first_reaching([0, 10, 20], [0.0, 0.5, 1.0], 0.75) == 15
    assert first_reaching([0, 10, 20], [0.0, 0.8, 0.2], 0.4) == 5
    assert first_reaching([0, 10], [0.9, 1.0], 0.9) == 0
    assert first_reaching([0, 10], [0.1, 0.2], 0.9) is None


def test_settings_come_in_layers(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(
        'env = {name = "agree", agents = 3}\nlearner = {lr = 1e-4, schedule = "linear"}\n[rollout]\ntasks = 4\n'
    )
    text = RECIPE.replace('env = {name = "agree"}', 'recipe = "base.toml"\nenv.turns = 2')
    plan, jobs = read_plan(write(tmp_path, text.replace("seeds =", "learning_rates = [1e-3, 2e-3]\nseeds =")), tmp_path / "out")
    assert plan.against is None
    names = [job.cell.folder.name for job in jobs]
    assert names[:2] == ["parallel-seed0", "parallel-seed1"]
    assert names[2:6] == ["magrpo-lr0.001-seed0", "magrpo-lr0.001-seed1", "magrpo-lr0.002-seed0", "magrpo-lr0.002-seed1"]
    assert len(jobs) == 2 + 4 + 4
    config = jobs[-1].config
    assert (config.env.name, config.env.options) == ("agree", {"agents": 3, "turns": 2, "wording": "plain"})
    assert (config.learner.lr, config.critic.lr, config.learner.schedule) == (2e-3, 2e-3, "linear")
    assert (config.run.seed, config.run.iterations, config.algorithm.name) == (1, 2, "collm-cc")
    assert config.run.folder == str(tmp_path / "out" / "two")


SHIPPED = ROOT / "recipes" / "compare"


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_trained_methods_of_a_shipped_comparison_get_the_same(name: str, tmp_path: Path) -> None:
    """The same joint actions, learning rates and seeds; critics the same switches, but the one that makes an own critic read
    its team-mates' answers; that one has a row of its own (dc-difference) where the claim is about critics."""
    plan, jobs = read_plan(SHIPPED / f"{name}.toml", tmp_path)
    trained: dict[tuple[str, bool], dict[str, Any]] = {}  # whole models have other rates than adapters
    for job in jobs:
        if job.trained:
            config = job.config
            episodes = config.rollout.tasks * config.algorithm.group_size
            about = (
                episodes,
                config.run.iterations,
                config.evaluation.every,
                config.learner.lr,
                config.critic.lr,
                job.cell.seed,
            )
            trained.setdefault((job.cell.task, config.team.lora is None), {}).setdefault(job.cell.method, set()).add(about)
    assert all(found == next(iter(methods.values())) for methods in trained.values() for found in methods.values())
    compared = [j.config for j in jobs if j.cell.method in ("collm-cc", "collm-dc") and j.cell.seed == plan.seeds[0]]
    same = {"lr": 0.1, "reads": "joint", "metrics": "auto"}
    assert len({repr(config.critic.model_copy(update=same)) for config in compared}) <= 1
    read = {config.returns_read(reported=True) for config in compared}
    assert len(read) <= 1 or all(config.critic.metrics == "auto" for config in compared)
    if name in ("str_build_sparse", "str_build_sparse_rates"):
        configs = {job.cell.method: job.config for job in jobs if (job.cell.seed, job.cell.rate) == (plan.seeds[0], 2e-4)}
        joint, own = configs["collm-cc"], configs["dc-difference"]
        assert own.critic == joint.critic.model_copy(update={"reads": "own", "metrics": "global"})
        assert own.algorithm == joint.algorithm.model_copy(update={"name": "collm-dc"})


def test_what_tells_one_run_from_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every setting that makes numbers, also from a preset that changes; neither the place, nor how a team would learn that
    does not, nor a setting of later times at the value of before."""

    def marks(text: str = RECIPE, out: str = "out") -> dict[str, str]:
        _, jobs = read_plan(write(tmp_path, text), tmp_path / out)
        return {job.cell.method: job.cell.settings for job in jobs if job.cell.seed == 0}

    first = marks()
    assert len(set(first.values())) == 3
    assert marks(out="elsewhere") == first
    warmed = marks(RECIPE.replace("[methods.magrpo]", '[settings.learner]\nschedule = "linear"\n[methods.magrpo]'))
    assert warmed["parallel"] == first["parallel"]
    assert not {warmed["magrpo"], warmed["collm-cc"]} & set(first.values())
    monkeypatch.setitem(former.ADDED, ("critic", "warmup"), 0)  # as if grids had been made before there was a warm-up
    later = marks()
    monkeypatch.setitem(ALGORITHMS["collm-cc"].critic, "warmup", 1)
    changed = marks()
    assert later["magrpo"] == changed["magrpo"]
    assert later["collm-cc"] != changed["collm-cc"]


def test_cells_of_before_are_those_of_the_same_meaning_today() -> None:
    """critic.metrics was true by default: that is what a joint critic reads today, and what own critics read if asked to."""

    def mark(name: str, env: str = "str_build", **critic: Any) -> str:
        settings = parse_config({"env": {"name": env}, "algorithm": {"name": name}}).resolved()
        return digest({**settings, "critic": {**settings["critic"], **critic}}, trained=True)

    for name in ("collm-cc", "collm-dc", "ac"):
        assert mark(name, metrics=True) == mark(name, metrics="global")
        assert mark(name, metrics=False) == mark(name, metrics="none")
    assert mark("collm-cc") == mark("collm-cc", metrics=True)
    assert mark("collm-dc") != mark("collm-dc", metrics=True)
    assert mark("ac") != mark("ac", metrics=True)
    assert mark("collm-cc", "mine:Env") != mark("collm-cc", "mine:Env", metrics=True), "it may report no metrics"


@pytest.mark.parametrize(("former", "now"), [(True, ["tensorboard"]), (False, [])])
def test_runs_that_exist_keep_their_mark_and_trackers_do_not_change_it(former: bool, now: list[str]) -> None:
    settings = parse_config({"env": {"name": "agree"}}).resolved()
    run = {key: value for key, value in settings["run"].items() if key != "trackers"}
    kept = digest({**settings, "run": {**run, "tensorboard": former}}, trained=True)
    assert digest({**settings, "run": {**run, "trackers": now}}, trained=True) == kept
    assert digest({**settings, "run": {**run, "trackers": [*now, "wandb", "mlflow"]}}, trained=True) == kept
    assert digest({**settings, "run": {**run, "tensorboard": former, "seed": 9}}, trained=True) != kept


def test_every_built_in_environment_reports_metrics() -> None:
    """What `digest` counts on; the data of some are not here."""
    for name in ("agree", "quote", "str_build", "house_build", "bridge_build", "resource_gathering"):
        assert metric_names(parse_config({"env": {"name": name}}))


def test_every_method_plays_as_many_episodes(tmp_path: Path) -> None:
    _, jobs = read_plan(write(tmp_path), tmp_path / "out")
    episodes = {(job.cell.method, job.config.rollout.tasks, job.config.algorithm.group_size) for job in jobs if job.trained}
    assert episodes == {("magrpo", 2, 4), ("collm-cc", 8, 1)}


def test_single_agent_methods_get_a_task_for_one(tmp_path: Path) -> None:
    text = RECIPE.replace('"parallel", "magrpo", "collm-cc"', '"raw", "grpo", "ac", "collm-cc"')
    _, jobs = read_plan(write(tmp_path, text), tmp_path / "out")
    agents = {job.cell.method: job.config.env.options.get("agents") for job in jobs}
    assert agents == {"raw": 1, "grpo": 1, "ac": 1, "collm-cc": None}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[compare]", "[compares]", "unknown table"),
        ("seeds =", "seed =", "compare.seed"),
        ('"collm-cc"]', '"collm-c"]', "unknown method 'collm-c'"),
        ("two = 0.9", "three = 0.9", "thresholds names 'three'"),
        ("every = 1", "every = 0", "evaluation.every=0 leaves nothing to compare"),
        ("tasks = 8", "tasks = 6", "is not a multiple of the group size 4"),
        ("learner.lr = 1e-3", "learner.rl = 1e-3", "unknown setting 'learner.rl'. Did you mean 'learner.lr'"),
        ('env = {name = "agree"}', 'recipe = "absent.toml"', "cannot be read"),
        ("[tasks.two]\nenv", "[task.two]\nenv", "unknown table"),
    ],
)
def test_a_bad_recipe_is_refused_before_anything_starts(
    tmp_path: Path, old: str, new: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(write(tmp_path, RECIPE.replace(old, new)), tmp_path / "out")
    assert main(["compare", str(write(tmp_path, RECIPE.replace(old, new))), "--folder", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert "Traceback" not in capsys.readouterr().err


DAMAGES = {
    "a row of words": (
        '"curve": [[0, "x"]]',
        "as a comparison's results: 'curve.0.1': input should be a valid number",
    ),
    "an empty curve": ('"curve": []', "'curve': list should have at least 1 item"),
    "NaN": ('"curve": [[0, NaN]]', "it holds NaN, which is not a number"),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_damaged_results_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    found, message = DAMAGES[damage]
    recipe, folder = write(tmp_path), tmp_path / "out"
    cell = read_plan(recipe, folder)[1][0].cell
    folder.mkdir()
    row = json.dumps({"task": cell.task, "method": cell.method, "learning_rate": None, "seed": 0, "settings": cell.settings})
    (folder / "results.json").write_text(
        f'{{"runs": [{row[:-1]}, {found}, "final": {{"reward": 1.0}}, "tokens_per_episode": 1.0, "joint_actions": 0,'
        ' "seconds": 0.0, "failed_episodes": 0, "judged": "", "explained_variance": {}, "ceiling": {}}]}'
    )
    assert main(["compare", str(recipe), "--folder", str(folder)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_damaged_settings_of_a_run_and_links_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, folder = write(tmp_path), tmp_path / "out"
    settings = folder / "two" / "parallel-seed0.json"
    settings.parent.mkdir(parents=True)
    for content in ("{", "[]", '{"run": 3}', "[" * 100_000):
        settings.write_text(content)
        assert main(["compare", str(recipe), "--folder", str(folder)]) == 2
        assert "parallel-seed0.json' cannot be read" in capsys.readouterr().err
    settings.unlink()
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    (folder / "two" / "parallel-seed0.log").symlink_to(precious)
    assert main(["compare", str(recipe), "--folder", str(folder)]) == 2
    assert "is a symbolic link" in capsys.readouterr().err
    assert precious.read_text() == "keep me"


@pytest.mark.parametrize("name", ["../two", "a/b", "", "two three"])
def test_a_task_that_cannot_name_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    recipe = write(tmp_path, RECIPE.replace("[tasks.two]", f'[tasks."{name}"]').replace("two = 0.9", ""))
    with pytest.raises(ConfigError, match="cannot name a folder"):
        read_plan(recipe, tmp_path / "out")


def test_some_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", str(write(tmp_path)), "--folder", str(tmp_path / "out"), "--dry-run", "--only"]
    assert main([*words, "two/magrpo-*"]) == 0
    told = capsys.readouterr().err.split()
    assert told[:2] == ["2", "runs,"]
    assert [Path(word).name for word in told if "out/two" in word] == ["magrpo-seed0", "magrpo-seed1"]
    assert main([*words, "magrpo"]) == 2
    assert "matches none of the 6 runs" in capsys.readouterr().err


def test_a_run_that_fails_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace('["parallel", "magrpo", "collm-cc"]', '["parallel", "magrpo"]').replace(
        "seeds = [0, 1]", "seeds = [0]"
    )
    (tmp_path / "empty").mkdir()
    text = text.replace("learner.lr = 1e-3", f'team.model = "{tmp_path / "empty"}"')
    out = tmp_path / "out"
    assert main(["compare", str(write(tmp_path, text)), "--folder", str(out)]) == 2
    shown = capsys.readouterr()
    assert "1 of 2 runs failed and are missing from the results, the first with: collm: " in shown.err
    assert "parallel" in shown.out
    plain = json.loads((out / "results.json").read_text())
    assert plain["missing"] == 1
    assert [run["method"] for run in plain["runs"]] == ["parallel"]


def made_up(folder: Path) -> Study:
    """Three seeds of two methods, two rates of one of them: held-out rewards before and after by hand."""
    cells = []
    finals = {("a", None): (0.2, 0.4, 0.6), ("b", 1e-3): (0.5, 0.5, 0.8), ("b", 1e-2): (0.1, 0.2, 0.1)}
    for (method, rate), values in finals.items():
        for seed, value in enumerate(values):
            cell = Cell("task", method, rate, seed, folder / f"{method}-{rate}-{seed}")
            records = [[{**record("one", score), "tokens": 7, "metrics": {"m": score}}] for score in (0.0, value)]
            write_run(cell.folder, {0: records[0], 4: records[1]})
            (cell.folder / "final").mkdir()
            cells.append(cell)
    return Study(cells, "b", {"task": 0.45})


def test_lines_differences_and_thresholds_by_hand(tmp_path: Path) -> None:
    found = read_grid(made_up(tmp_path))
    lines = {line.method: line for line in found.lines("task")}
    assert (lines["a"].rate, lines["b"].rate) == (None, 1e-3)
    assert lines["b"].final["reward"].mean == pytest.approx(0.6)
    assert lines["b"].area.mean == pytest.approx(0.3)
    assert lines["b"].area.low == pytest.approx(0.25)
    assert lines["a"].reached(0.45) == [None, None, pytest.approx(30.0)]
    differences = found.differences("task")["a"]["area"]
    assert differences.mean == pytest.approx((0.15 + 0.05 + 0.1) / 3)
    assert differences.low == pytest.approx(0.05)
    student = found.differences("task")["a"]["area, Student's t"]  # deviations of 0.15, 0.05, 0.1: s = 0.05
    assert (student.mean, student.high) == (pytest.approx(0.1), pytest.approx(0.1 + 4.30265 * 0.05 / 3**0.5))
    t = 0.1 / (0.05 / 3**0.5)
    single, corrected = found.p_values("task")["a"]
    assert single == pytest.approx(1 - t / (2 + t**2) ** 0.5) == corrected  # two degrees of freedom; one test
    plain_difference = found.plain()["tasks"]["task"]["b minus"]["a"]
    assert plain_difference["area, p by Holm"] == corrected
    plain: dict[str, Any] = found.plain()
    assert plain["missing"] == 0
    assert plain["tasks"]["task"]["methods"]["a"]["joint_actions_to_threshold"] == [None, None, pytest.approx(30.0)]
    assert [run["curve"][-1] for run in plain["runs"]][:3] == [[40, 0.2], [40, 0.4], [40, 0.6]]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_what_is_written_stays_when_its_folder_is_gone(tmp_path: Path) -> None:
    study, written = made_up(tmp_path), tmp_path / "results.json"
    study.cells[0].folder.joinpath("final").rmdir()
    study = Study([replace(cell, settings=f"of {cell.name}") for cell in study.cells], "b", study.thresholds)
    before = read_grid(study, written)
    assert before.missing == 1
    written.write_text(json.dumps(before.plain()))
    shutil.rmtree(study.cells[-1].folder)
    study.cells[0].folder.joinpath("final").mkdir()  # finished since
    after = read_grid(study, written)
    assert after.missing == 0
    assert after.results[1:] == before.results
    assert after.plain()["runs"][1:] == before.plain()["runs"]
    written.write_text(written.read_text().replace('"ceiling"', '"yardstick"'))  # as a former version named it
    assert read_grid(study, written) == after

    changed = [replace(cell, settings="others") for cell in study.cells]
    with pytest.raises(RunError, match=r"other settings than the recipe now has: b on task, learning rate 0.01, seed 2\."):
        read_grid(Study(changed, "b"), written)
    with pytest.raises(RunError, match="that is not in the recipe: a on task"):
        read_grid(Study(study.cells[3:], "b"), written)
    older = after.plain()
    del older["runs"][2]["judged"]
    for damaged in ("{", json.dumps(older)):
        written.write_text(damaged)
        with pytest.raises(RunError, match="cannot be read"):
            read_grid(study, written)


def test_two_seeds_give_no_interval_and_say_so(tmp_path: Path) -> None:
    study = made_up(tmp_path)
    found = read_grid(Study([cell for cell in study.cells if cell.seed < 2], "b"))
    area = found.lines("task")[0].area
    assert (area.low, area.high) == (None, None)
    assert "a bootstrap over seeds needs at least 3" in area.note


def test_failed_episodes_are_counted_and_shown(tmp_path: Path) -> None:
    study = made_up(tmp_path)
    lost = [record("one", 1.0, tokens=7), {**record("two", 0.0, tokens=7), "failure": "no room"}]
    shutil.rmtree(study.cells[0].folder)
    write_run(study.cells[0].folder, {0: lost[:1], 4: lost})
    (study.cells[0].folder / "final").mkdir()
    found = read_grid(study)
    assert [result.failed for result in found.results] == [1] + 8 * [0]
    text = io.StringIO()
    Console(file=text, width=200).print(*grid_tables(found))
    assert "held-out episodes that failed, left out of all numbers: a 1" in text.getvalue()
    assert "Student's t" in text.getvalue()


def test_a_run_without_evaluation_is_refused_by_name(tmp_path: Path) -> None:
    study = made_up(tmp_path)
    for path in study.cells[0].folder.rglob("*evaluation*"):
        path.unlink()
    with pytest.raises(RunError, match="no held-out evaluation to compare"):
        read_grid(study)


def test_what_critics_explain_is_that_of_the_second_half_over_seeds(tmp_path: Path) -> None:
    cells = []
    for seed in range(3):
        cell = Cell("task", "a", None, seed, tmp_path / f"a-{seed}")
        shares = [None, -9.0, None, -9.0, 0.1 + seed]  # up to 0, 10, 20, 30, 40 joint actions
        metrics = [{"critic/explained_within_tasks_turn_1": share, "ceiling_turn_1": share} for share in shares]
        for number, row in enumerate(metrics):
            row["critic/explained_variance_turn_1"] = 0.0
            row["critic/explained_within_tasks_turn_0"] = row["critic/explained_variance_turn_0"] = 0.5 * number
            row["spread_turn_0"] = [9.0, 9.0, 0.0, 1.0, 3.0][number]  # what there was to explain
        write_run(cell.folder, {0: [record("one", 0.0, tokens=7)]}, metrics)
        (cell.folder / "final").mkdir()
        cells.append(cell)
    line = read_grid(Study(cells, "a")).lines("task")[0]
    assert line.results[2].explained[1] == line.results[2].ceiling[1] == pytest.approx((2.1 - 9.0) / 2)
    assert line.results[2].explained[0] == pytest.approx((1 * 1.5 + 3 * 2.0) / 4)
    assert line.explained[1].mean == pytest.approx((1.1 - 9.0) / 2)
    assert line.results[0].judged == "within tasks"


def test_where_tasks_seldom_repeat_an_iteration_counts_by_all_its_variation(tmp_path: Path) -> None:
    """A task drawn twice in one of five iterations must not make that iteration the only one that counts."""
    cell = Cell("task", "a", None, 0, tmp_path / "a")
    metrics = [
        {
            "critic/explained_within_tasks_turn_0": -5.0 if number == 3 else None,
            "critic/explained_variance_turn_0": 0.2 * number,
            "spread_turn_0": 0.01 if number == 3 else 0.0,
            "variation_turn_0": [9.0, 9.0, 9.0, 1.0, 3.0][number],
        }
        for number in range(5)
    ]
    old = Cell("task", "old", None, 0, tmp_path / "old")
    write_run(cell.folder, {0: [record("one", 0.0, tokens=7)]}, metrics)
    without = [{name: value for name, value in row.items() if name != "variation_turn_0"} for row in metrics]
    write_run(old.folder, {0: [record("one", 0.0, tokens=7)]}, without)
    assert read_result(cell).explained[0] == pytest.approx((1 * 0.6 + 3 * 0.8) / 4)
    assert read_result(cell).judged == "tasks included"
    assert read_result(old).explained[0] == pytest.approx((0.6 + 0.8) / 2)  # recorded before variations were


def strip(plain: Any) -> Any:
    """Without seconds: all that may differ between two machines' moods."""
    if isinstance(plain, dict):
        return {key: strip(value) for key, value in plain.items() if key != "seconds"}
    return [strip(value) for value in plain] if isinstance(plain, list) else plain


@pytest.mark.slow
def test_killed_in_the_middle_it_repeats_nothing_and_ends_the_same(tmp_path: Path) -> None:
    recipe = write(tmp_path, RECIPE.replace("iterations = 2", "iterations = 12").replace("every = 1", "every = 4"))
    command = [sys.executable, "-m", "collm.cli.main", "compare", str(recipe), "--json", "--folder"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], capture_output=True, check=True, text=True)
    folder = tmp_path / "cut"
    with subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while len(list(folder.glob("two/magrpo*/final"))) < 1 or not list(folder.glob("two/magrpo-seed1/metrics.jsonl")):
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("two/*/final")}
    assert 3 <= len(finished) < 6
    with (folder / "two" / "magrpo-seed1" / "lock").open() as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)  # the orphan saves and leaves by itself
    again = subprocess.run([*command, str(folder)], capture_output=True, check=True, text=True)
    assert f"{len(finished)} of them already finished" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert strip(json.loads(again.stdout)) == strip(json.loads(whole.stdout))
    assert strip(json.loads((folder / "results.json").read_text())) == strip(json.loads(whole.stdout))
    folder = folder.rename(tmp_path / "moved")  # where runs lie makes no other numbers
    shutil.rmtree(folder / "two" / "magrpo-seed0")  # nor whether they still do
    moved = subprocess.run([*command, str(folder), "--dry-run"], capture_output=True, check=True, text=True)
    assert "6 runs, 6 of them already finished" in moved.stderr
    changed = recipe.read_text().replace("learner.lr = 1e-3", "learner.lr = 2e-3")
    recipe.write_text(changed)
    refused = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "was begun with other settings" in refused.stderr
