"""Intervals by hand, comparisons that pair the right tasks, pictures that show what was built; and none of it loads torch."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from collm.cli.main import main
from collm.engines.scripted import ScriptedEngine
from collm.envs.building.font import cells
from collm.envs.building.str_build import PALETTES
from collm.envs.catalogue import EnvSpec
from collm.errors import RunError
from collm.reports.builds import BLOCKS, Build, Gallery, choose, picture, read_build
from collm.reports.curves import draw_curves, run_names
from collm.reports.page import page_data
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.runs.log import episode_record
from collm.runs.open import open_run
from collm.studies.before_after import before_after
from collm.studies.series import ceiling_by_turn, explained_by_turn, held_out_curve
from collm.types import Request

WORDS = ("AN", "AT", "BE", "DO", "GO", "IN", "IT", "ON", "UP")
NINE = tuple(f"task{i}" for i in range(9))


def record(label: str, score: float | None, **changes: Any) -> dict[str, Any]:
    """One line of an evaluation's file."""
    return {"task": 0, "label": label, "score": score, "metrics": {}, "failure": "", "state": "", "turns": [], **changes}


def write_run(
    folder: Path,
    evaluations: Mapping[int, Sequence[dict[str, Any]]],
    metrics: Sequence[dict[str, Any]] = (),
    iterations: int = 4,
) -> Path:
    """A run directory by hand: 10 joint actions, 3 seconds and 100 tokens an iteration."""
    (folder / "episodes").mkdir(parents=True)
    config = {"run": {"iterations": iterations, "seed": 0}, "env": {"name": "made_up"}, "algorithm": {"name": "collm-cc"}}
    (folder / "config.json").write_text(json.dumps(config))
    lines: list[dict[str, Any]] = [{"iteration": 0, "joint_actions": 0}]
    for i in range(1, iterations + 1):
        cost = {"seconds/collect": 2.0, "seconds/learn": 1.0, "tokens/sampled": 100}
        lines.append({"iteration": i, "joint_actions": 10 * i, "reward/raw": i / 10, **cost})
    for line, more in zip(lines, metrics, strict=False):
        line.update(more)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for iteration, records in evaluations.items():
        path = folder / "episodes" / f"{iteration:06d}-evaluation.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder


def played(shade: int) -> list[dict[str, Any]]:
    """The nine words as two scripted builders leave them: `shade` 0 puts one block everywhere, 1 alternates two."""

    def answer(request: Request) -> str:
        number = int(request.agent[-1])
        word = request.messages[0].text.split("Build ")[1].split(" ")[0]
        own = sorted(cell for cell in cells(word) if sum(cell) % 2 == number)
        return "\n".join(f"/setblock {x} {y} 0 {PALETTES[number][shade * (y % 2)]}" for x, y in own)

    plan = Plan(EnvSpec("str_build", {"wording": "terse", "turns": 1, "strings": list(WORDS)}))
    groups = collect(plan, ScriptedEngine(answer), range(len(WORDS)), range(len(WORDS)))
    return [json.loads(json.dumps(episode_record(group.episodes[0]))) for group in groups]


# --- before and after ------------------------------------------------------------------------------------------------


def test_differences_are_paired_by_task_not_by_line(tmp_path):
    """Tasks differ by far more than training adds: intervals overlap, yet every task gained exactly 0.25."""
    before = [record(task, float(i), metrics={"m": 0.0}) for i, task in enumerate(NINE)]
    after = [record(task, i + 0.25, metrics={"m": 1.0}) for i, task in reversed(list(enumerate(NINE)))]
    comparison = before_after(open_run(write_run(tmp_path / "run", {0: before, 2: after[::2], 4: after})))
    reward, m = comparison.rows["reward"], comparison.rows["m"]
    assert (comparison.first, comparison.last, comparison.num_tasks) == (0, 4, 9)
    assert (reward.before.mean, reward.after.mean) == (4.0, 4.25)
    assert (reward.difference.mean, reward.difference.low, reward.difference.high) == (0.25, 0.25, 0.25)
    assert not reward.apart
    assert m.apart
    assert comparison.notes == []


def test_failed_tasks_are_left_out_of_both_and_counted(tmp_path):
    before = [record(task, 1.0) for task in NINE]
    after = [record(task, 2.0) for task in NINE[:-1]] + [record("task8", 50.0, failure="no answer at turn 2")]
    before[-1]["score"] = 100.0
    comparison = before_after(open_run(write_run(tmp_path / "run", {0: before, 4: after})))
    assert comparison.num_tasks == 8
    assert comparison.rows["reward"].before.mean == 1.0
    assert comparison.notes == ["left out: 1 tasks that were not played to their end both times"]


def test_a_metric_that_some_tasks_lack_is_nan_with_a_note(tmp_path, capsys):
    before = [record(task, 1.0, metrics={"m": 1.0} if i else {"m": None}) for i, task in enumerate(NINE)]
    after = [record(task, 2.0, metrics={"m": 1.0} if i > 1 else {}) for i, task in enumerate(NINE)]
    folder = write_run(tmp_path / "run", {0: before, 4: after})
    comparison = before_after(open_run(folder))
    assert comparison.notes == ["m: not a finite number for 2 of 9 tasks"]
    assert comparison.rows["m"].before.note == "not a finite number for 1 of 9 tasks"
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["metrics"]["m"]["difference"]["mean"] is None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.rename(run.with_name("moved")), "is not a run directory"),
        (lambda run: (run / "config.json").unlink(), "holds no config.json"),
        (lambda run: (run / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda run: (run / "config.json").write_text("[]"), "cannot be read"),
        (lambda run: (run / "metrics.jsonl").unlink(), "No such file"),
        (lambda run: (run / "metrics.jsonl").write_text('{"iteration": 0}\n'), "line 1, is damaged: it lacks 'joint_actions'"),
        (lambda run: (run / "metrics.jsonl").write_text("\n3\n"), "line 1, is damaged"),
        (lambda run: (run / "episodes" / "000004-evaluation.jsonl").write_text("{}x\n{}\n"), "line 1, is damaged"),
        (lambda run: (run / "episodes" / "000004-evaluation.jsonl").write_text(""), "no held-out episode"),
        (lambda run: (run / "episodes" / "000004-evaluation.jsonl").unlink(), "has only one, after 0 iterations"),
        (lambda run: [path.unlink() for path in (run / "episodes").iterdir()], "has none"),
        (lambda run: (run / "report").write_text("in the way"), "cannot write"),
    ],
)
def test_a_missing_or_damaged_run_is_one_clear_message(tmp_path, capsys, damage, message):
    run = write_run(tmp_path / "run", {0: [record("a", 1.0)], 4: [record("a", 2.0)]})
    damage(run)
    assert main(["report", str(run)]) == (1 if "write" in message else 2)
    out = capsys.readouterr()
    assert message in out.err
    assert str(run) in out.err
    assert out.err.count("\n") == 1


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", {})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "joint_')
    assert [line["iteration"] for line in open_run(folder).metrics] == [0, 1, 2, 3, 4]


def test_curves_take_their_numbers_from_the_run(tmp_path):
    """Own critics are averaged turn by turn; a value that does not exist stays a gap."""
    metrics = [
        {},
        {"a/critic/explained_variance_turn_0": 0.2, "b/critic/explained_variance_turn_0": 0.4},
        {"a/critic/explained_variance_turn_0": None, "b/critic/explained_variance_turn_0": 0.4},
        {"critic/explained_variance_turn_1": 0.7, "critic/loss": 9.0},
    ]
    evaluations = {i: [record(task, float(i)) for task in NINE] for i in (0, 3)}
    run = open_run(write_run(tmp_path / "run", evaluations, metrics))
    curves = explained_by_turn(run)
    assert list(curves) == [0, 1]
    assert curves[0][0].tolist() == [10, 20]
    assert curves[0][1][0] == pytest.approx(0.3)
    assert math.isnan(curves[0][1][1])
    assert [curve.tolist() for curve in curves[1]] == [[30], [0.7]]
    assert ceiling_by_turn(run) == {}
    at, rewards = held_out_curve(run)
    assert at == [0, 30]
    assert [reward.mean for reward in rewards] == [0.0, 3.0]
    assert run.cost() == {"joint_actions": 40, "seconds": 12.0, "tokens": 400}


def test_a_critic_is_shown_within_tasks_where_tasks_repeat_and_beside_its_metric_ceiling(tmp_path):
    names = ("critic/explained_variance_turn_{}", "critic/explained_within_tasks_turn_{}", "ceiling_turn_{}")
    metrics = [{name.format(0): value for name, value in zip(names, (0.9, 0.3, 0.4), strict=True)}]
    metrics += [{name.format(1): value for name, value in zip(names, (0.8, None, None), strict=True)}]
    run = open_run(write_run(tmp_path / "run", {0: [record("a", 1.0)], 1: [record("a", 2.0)]}, metrics))
    assert {turn: y.tolist() for turn, (_, y) in explained_by_turn(run).items()} == {0: [0.3]}
    assert {turn: y.tolist() for turn, (_, y) in ceiling_by_turn(run).items()} == {0: [0.4]}
    rows = ((0.7, -9.0, 0.4), (0.8, None, None), (0.8, None, None))
    chance = [{name.format(0): value for name, value in zip(names, row, strict=True)} for row in rows]
    once = open_run(write_run(tmp_path / "once", {0: [record("a", 1.0)], 3: [record("a", 2.0)]}, chance))
    assert {turn: y.tolist() for turn, (_, y) in explained_by_turn(once).items()} == {0: [0.7, 0.8, 0.8]}
    assert ceiling_by_turn(once) == {}
    assert draw_curves([run], tmp_path / "curves.png").stat().st_size > 10_000


# --- builds ----------------------------------------------------------------------------------------------------------


def test_colours_and_digits_are_those_of_the_world():
    """The room may not import the world, so it keeps the order of the blocks itself."""
    assert list(BLOCKS) == [block for palette in PALETTES for block in palette]
    assert len(set(BLOCKS.values())) == len(BLOCKS)


def test_a_build_is_read_from_what_the_world_wrote():
    build = read_build(played(1)[6])
    assert build is not None
    assert build.word == "IT"
    assert build.target[0] == "#####..#####"
    assert build.blocks[0] == "02020..20202"  # y = 4 is even, so each builder's first block; x + y even is builder_0's
    assert build.blocks[1] == "..3......1.."  # y = 3, second blocks; 2 + 3 is odd, builder_1's; 9 + 3 is builder_0's
    assert build.agents == ("builder_0", "builder_1")
    assert (build.iou, build.caption) == (1.0, "IoU 1.00, reward 2.00")
    assert read_build(record("x", 1.0, state="turn 0 of 1")) is None


def test_words_are_chosen_evenly_and_said_to_be():
    gallery = choose(played(0), played(1))
    assert [build.word for build in gallery.after] == ["AN", "GO", "UP"]
    assert [build.word for build in gallery.before] == ["AN", "GO", "UP"]
    assert gallery.choice == "words 1, 5, 9 of 9 held-out words: evenly spaced, not picked by result"
    assert choose(played(0)[:2], played(1)).choice == "all held-out words"
    assert choose(played(0)[:2], played(1)[2:]) is None
    assert choose([record("x", 1.0)], [record("x", 1.0)]) is None


SMALL = Build("L", ("#..", "#..", "###"), ("0..", "..1", "23."), ("builder_0", "builder_1"), reward=0.5, iou=0.6)


def test_the_picture_says_without_colours_what_it_shows_with_them():
    """Covered 00, 22 and 33; outside x1; left empty two cells of the word."""
    gallery = Gallery([SMALL], [SMALL], [1], 1)
    plain = Console(file=io.StringIO(), width=100)
    plain.print(picture(gallery, 100))
    lines = [line.rstrip() for line in plain.file.getvalue().split("\n")]
    gap = "   "
    assert lines[0] == "L before  IoU 0.60, reward 0.50" + gap + "L after  IoU 0.60, reward 0.50"
    assert [line[:6] for line in lines[1:4]] == ["00    ", "..  x1", "2233.."]
    assert [line[34:40] for line in lines[1:4]] == ["00", "..  x1", "2233.."]
    coloured = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="truecolor")
    coloured.print(picture(gallery, 60))
    text = coloured.file.getvalue()
    oak, wall = (";".join(str(int(c[i : i + 2], 16)) for i in (1, 3, 5)) for c in (BLOCKS["oak_planks"], "#14181d"))
    assert f"48;2;{oak}m0" in text  # the block's own colour behind its digit
    assert f"48;2;{wall}m  " in text
    assert text.index("L before") < text.index("\n") < text.index("L after")  # too narrow for both: one above the other


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def building(tmp_path) -> Path:
    return write_run(tmp_path / "building", {0: played(0), 4: played(1)})


def test_the_report_of_a_building_run(building, capsys):
    """One block everywhere: builders' cells alternate, so no pair matches, and each misses a block: 2 - 0.5; then 2."""
    assert main(["report", str(building)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.split("\n") if line.startswith("reward"))
    assert row.strip().split("  ")[-1].strip() == "+0.500 [0.500, 0.500] *"
    assert "1.500 [1.500, 1.500]" in row
    assert "9 held-out tasks before training and after 4 iterations" in out
    assert "evenly spaced" in out
    for name in ("curves.png", "builds.png"):
        path = building / "report" / name
        assert f"wrote {path}" in out
        with Image.open(path) as image:
            assert min(image.size) > 400
    with Image.open(building / "report" / "builds.png") as image:
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 20)}
    used = [tuple(bytes.fromhex(BLOCKS[block][1:])) for palette in PALETTES[:2] for block in palette]
    assert colours.issuperset(used)


def test_json_of_several_runs_and_one_overlay(building, tmp_path, capsys):
    other = write_run(tmp_path / "other", {0: [record(t, 0.0) for t in NINE], 2: [record(t, 1.0) for t in NINE]})
    assert main(["report", str(building), str(other), str(other), "--json"]) == 0
    out = capsys.readouterr().out
    both = json.loads(out)
    assert out.count("\n") == 1
    assert [run["run"] for run in both["runs"]] == [str(building), str(other)]  # a run given twice is one run
    assert both["files"] == [str(building / "report" / name) for name in ("report-of-runs.html", "curves-of-runs.png")]
    first, second = both["runs"]
    assert first["reward"]["difference"] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert first["reward"]["apart"]
    assert first["metrics"]["missing_blocks"]["before"]["mean"] == 2
    assert second["iterations"] == {"before": 0, "after": 2, "planned": 4}
    assert (second["joint_actions"], second["seconds"], second["tokens"], second["tasks"]) == (40, 12.0, 400, 9)
    assert all(Path(path).stat().st_size for run in both["runs"] for path in run["files"])


def test_several_runs_are_a_line_each(building, tmp_path, capsys):
    other = write_run(tmp_path / "other[x]", {0: [record(t, 0.0) for t in NINE], 4: [record(t, 1.0) for t in NINE]})
    assert main(["report", str(building), str(other)]) == 0
    table = capsys.readouterr().out.split("held-out mean")[1]
    lines = [line.split() for line in table.split("\n")]
    assert ["building", "2.000", "[2.000,", "2.000]", "40", "12", "400"] in lines
    assert ["other[x]", "1.000", "[1.000,", "1.000]", "40", "12", "400"] in lines
    assert run_names([open_run(building), open_run(other)]) == ["building", "other[x]"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    runs = [open_run(write_run(tmp_path / folder / "run", {})) for folder in "ab"]
    assert run_names(runs) == [str(run.folder) for run in runs]


def test_a_report_loads_no_torch(building):
    code = "import sys; from collm.cli.main import main; code = main(sys.argv[1:]); print('torch' in sys.modules); exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "report", str(building)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")


def test_a_run_without_two_evaluations_says_what_to_do(tmp_path):
    with pytest.raises(RunError, match=r"--resume .* evaluation\.every=0"):
        before_after(open_run(write_run(tmp_path / "run", {0: [record("a", 1.0)]})))


def test_alarms_of_a_run_are_in_the_notes_of_its_table_and_apart_on_its_page(tmp_path: Path) -> None:
    alarm = {"alarm/answers_rejected": 0.8, "answers_rejected": 0.8}
    nine = [record(task, 0.5) for task in NINE]
    run = open_run(write_run(tmp_path / "run", {0: nine, 4: nine}, [{}, alarm]))
    (note,) = [note for note in before_after(run).notes if note.startswith("warning")]
    assert note.startswith("warning after iteration 1: the environment rejected 80% of what the first iteration's answers hold")
    alone = open_run(write_run(tmp_path / "alone", {0: nine}, [{}, alarm]))
    for shown in page_data([run, alone])["runs"]:
        assert shown["alarms"] == [note]
        assert note not in shown["notes"]
