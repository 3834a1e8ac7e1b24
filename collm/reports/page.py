"""`report.html`: one self-contained page about one or several runs, whose episodes can be read turn by turn."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from collm.errors import RunError
from collm.reports.builds import BLOCKS
from collm.reports.curves import COLOURS, run_names
from collm.runs.alarms import recorded
from collm.runs.files import write_text
from collm.runs.open import Run
from collm.runs.read import Record, read_episodes
from collm.studies.before_after import before_after
from collm.studies.blame import by_credit, failed
from collm.studies.intervals import Interval
from collm.studies.series import ceiling_by_turn, explained_by_turn, held_out_curve

EPISODES = 24
"""Greatest number of episodes of one evaluation on a page: the worst, the best, and evenly spaced ones between."""
POINTS = 500
"""Greatest number of points of one curve, which is drawn 460 units wide: every k-th point, and the last one."""


def write_page(runs: Sequence[Run], path: Path) -> Path:
    """Write the page. Raises RunError where a run is damaged, SaveError where the file cannot be written."""
    write_text(path, page_text(page_data(runs)))
    return path


def page_text(data: Record) -> str:
    """The page that shows the data. With the key "version" it also asks its server for what changes, as `collm.reports.live`
    gives it."""
    template = resources.files("collm.reports").joinpath("page.html").read_text(encoding="utf-8")
    text = plain(data).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    title = html.escape(", ".join(run["name"] for run in data["runs"]))
    return template.replace("/*data*/", text, 1).replace("<!--title-->", title, 1)


def plain(data: Record) -> str:
    """Compact JSON without NaN."""
    return json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def page_data(runs: Sequence[Run]) -> Record:
    """Everything the page shows, as plain values."""
    records = [run_data(name, run, COLOURS[n % len(COLOURS)]) for n, (name, run) in enumerate(zip(run_names(runs), runs))]
    return {"runs": records, **settings_data([run.config for run in runs])}


def settings_data(configs: Sequence[Record]) -> Record:
    """The settings of all runs side by side, the names of those that differ, and what the digits of a build are."""
    settings = [flat(json.loads(json.dumps(config), parse_constant=str)) for config in configs]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    differing = [key for key in keys if len({json.dumps(values.get(key)) for values in settings}) > 1]
    digits = zip("0123456789abcdef", BLOCKS.items(), strict=True)
    blocks = {digit: {"name": name, "colour": colour} for digit, (name, colour) in digits}
    return {
        "settings": {key: [values.get(key) for values in settings] for key in keys},
        "differing": differing,
        "blocks": blocks,
    }


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings as "room.key" -> value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return found


def run_data(name: str, run: Run, colour: str) -> Record:
    """What the page shows of one run, finished or not. Raises RunError where the run is damaged."""
    at, rewards = held_out_curve(run)
    training = [(r["joint_actions"], r["reward/raw"]) for r in run.metrics if r.get("reward/raw") is not None]
    explained, ceiling = (
        {
            f"turn {turn + 1}": thin([[x, y if math.isfinite(y) else None] for x, y in zip(*map(list, points), strict=True)])
            for turn, points in curves.items()
        }
        for curves in (explained_by_turn(run), ceiling_by_turn(run))
    )
    alarms, (sets, newest) = recorded(run.metrics), _episode_sets(run)
    rows, labels, notes = _compared(run)
    return {
        "name": name,
        "colour": colour,
        "folder": str(run.folder),
        "algorithm": run.config["algorithm"]["name"],
        "env": run.config["env"]["name"],
        "iterations": [run.metrics[-1]["iteration"] if run.metrics else 0, run.planned],
        "cost": run.cost(),
        "rows": rows,
        "labels": labels,
        "notes": [note for note in notes if note not in alarms],
        "alarms": alarms,
        "held_out": thin([[x, r.mean, r.low, r.high] for x, r in zip(at, rewards, strict=True)]),
        "training": thin([list(point) for point in training]),
        "explained": explained,
        "ceiling": ceiling,
        "sets": sets,
        "newest": newest,
    }


def _compared(run: Run) -> tuple[Record, list[str], list[str]]:
    """Rows, labels and notes of the table of held-out results; without rows the notes have the reason."""
    if (num := len(run.evaluations())) < 2:
        return {}, [], [f"Results before and after training need two held-out evaluations; so far there are {num}."]
    try:
        comparison = before_after(run)
    except RunError as error:
        return {}, [], [str(error)]
    rows = {
        measure: {"before": _shown(row.before), "after": _shown(row.after), "apart": row.apart}
        for measure, row in comparison.rows.items()
    }
    about = f"{comparison.num_tasks} held-out tasks; mean [95 % interval] over tasks"
    return rows, list(comparison.labels), [about, *comparison.notes]


def thin(points: list[Any]) -> list[Any]:
    """At most `POINTS` of the points, evenly spaced, the last one among them."""
    step = math.ceil(len(points) / POINTS)
    return points[::-1][::step][::-1] if step > 1 else points


def _shown(found: Interval) -> list[float | None]:
    return [found.mean if math.isfinite(found.mean) else None, found.low, found.high]


def _episode_sets(run: Run) -> tuple[list[Record], str]:
    """Episodes of the first and the last held-out evaluation and of the first and the last recorded training iteration, and the
    name of the newest of these sets, or ""."""
    wanted: list[tuple[int, str, Path]] = []
    for name, found in (
        ("held-out, after {} iterations", run.evaluations()),
        ("training, iteration {}", run.training_episodes()),
    ):
        ends = sorted({*list(found)[:1], *list(found)[-1:]}, reverse=True)
        wanted += [(number, name.format(number), found[number]) for number in ends]
    sets = [{"name": name, "episodes": pick(with_blame(read_episodes(path)))} for _, name, path in wanted]
    return sets, max(wanted, key=lambda found: found[0])[1] if wanted else ""


def with_blame(episodes: Sequence[Record]) -> list[Record]:
    """The episodes; failed ones have `blamed`, the answer that cost most by the run's own credit, where it was recorded."""
    poor = {id(episode): by_credit(episode) for episode in failed(episodes)}
    faults = [(episode, poor.get(id(episode))) for episode in episodes]
    return [episode if fault is None else {**episode, "blamed": fault.plain()} for episode, fault in faults]


def pick(episodes: Sequence[Record]) -> list[Record]:
    """At most `EPISODES` evenly spaced episodes from worst to best score; failed episodes come first."""
    ordered = sorted(episodes, key=lambda e: (-math.inf if e["score"] is None or e["failure"] else e["score"], e["task"]))
    if len(ordered) <= EPISODES:
        return ordered
    return [ordered[round(place * (len(ordered) - 1) / (EPISODES - 1))] for place in range(EPISODES)]
