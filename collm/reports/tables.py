"""Held-out results as numbers and as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from collm.errors import RunError
from collm.reports.intervals import Interval, by_task, interval
from collm.runs.directory import command
from collm.runs.read import Record, Run, read_evaluation

if TYPE_CHECKING:
    from collm.reports import grid

REWARD = "reward"
"""The raw reward of the last turn played; the other rows are the task's own metrics."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measure before and after training, and the mean of its tasks' differences (after minus before)."""

    before: Interval
    after: Interval
    difference: Interval

    @property
    def apart(self) -> bool:
        """Whether the intervals before and after do not overlap."""
        return self.before.apart(self.after)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run's first and last held-out evaluation, over the tasks that both played to their end.

    first, last: iterations done when they were made. before, after: their episodes. rows: "reward" first.
    notes: what a reader must know about the numbers.
    """

    run: Run
    first: int
    last: int
    num_tasks: int
    rows: dict[str, Row]
    before: list[Record]
    after: list[Record]
    notes: list[str]

    @property
    def labels(self) -> tuple[str, str]:
        """What to call the two evaluations."""
        of = "" if self.last == self.run.planned else f" of {self.run.planned}"
        return "before training" if self.first == 0 else f"after {self.first}", f"after {self.last}{of} iterations"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        config = self.run.config
        rows = {
            name: {
                "before": row.before.plain(),
                "after": row.after.plain(),
                "difference": row.difference.plain(),
                "apart": row.apart,
            }
            for name, row in self.rows.items()
        }
        return {
            "run": str(self.run.folder),
            "env": config["env"]["name"],
            "algorithm": config["algorithm"]["name"],
            "seed": config["run"].get("seed"),
            "iterations": {"before": self.first, "after": self.last, "planned": self.run.planned},
            "tasks": self.num_tasks,
            "reward": rows.pop(REWARD),
            "metrics": rows,
            "notes": self.notes,
            **self.run.cost(),
        }


def compare(run: Run) -> Comparison:
    """Compare a run's last held-out evaluation with its first. Raises RunError while there are not two of them."""
    evaluations = run.evaluations()
    if len(evaluations) < 2:
        have = f"only one, after {next(iter(evaluations))} iterations" if evaluations else "none"
        resume = command("collm", "train", "--resume", run.folder)
        raise RunError(
            f"run {str(run.folder)!r} needs two held-out evaluations to compare and has {have}. Let it train on "
            f"({resume}); a run with evaluation.every=0 makes none: see `collm evaluate`."
        )
    first, last = min(evaluations), max(evaluations)
    before, after = read_evaluation(evaluations[first]), read_evaluation(evaluations[last])
    old, new = scores(before), scores(after)
    tasks = [task for task in new[REWARD] if task in old[REWARD]]
    if not tasks:
        raise RunError(f"the first and the last held-out evaluation of run {str(run.folder)!r} have no task in common.")
    rows = {
        name: Row(
            interval([old[name][task] for task in tasks]),
            interval([new[name][task] for task in tasks]),
            interval([new[name][task] - old[name][task] for task in tasks]),
        )
        for name in new
        if name in old
    }
    notes = explain({name: row.difference for name, row in rows.items()})
    left_out = len(old[REWARD].keys() | new[REWARD].keys()) - len(tasks)
    if left_out:
        notes.append(f"left out: {left_out} tasks that were not played to their end both times")
    return Comparison(run, first, last, len(tasks), rows, before, after, notes)


def scores(episodes: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Measure -> distinct task -> value; "reward" first. A metric that an episode lacks is NaN."""
    tasks = [episode["label"] or str(episode["task"]) for episode in episodes]
    columns = {REWARD: [episode["score"] for episode in episodes]}
    for name in dict.fromkeys(name for episode in episodes for name in episode["metrics"]):
        columns[name] = [episode["metrics"].get(name) for episode in episodes]
    return {
        name: by_task(tasks, [math.nan if value is None else float(value) for value in column])
        for name, column in columns.items()
    }


def explain(intervals: Mapping[str, Interval]) -> list[str]:
    """Why intervals are missing, each reason once, with the measures it holds for unless these are all."""
    reasons: dict[str, list[str]] = {}
    for name, found in intervals.items():
        if found.note:
            reasons.setdefault(found.note, []).append(name)
    return [reason if len(names) == len(intervals) else f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def comparison_table(comparison: Comparison, digits: int = 3) -> Group:
    """Before and after training, a measure a line."""
    table = _table("", "before", "after", "difference")
    for name, row in comparison.rows.items():
        difference = spread(row.difference, digits, sign="+") + (" *" if row.apart else "")
        cells = (Text(name), spread(row.before, digits), spread(row.after, digits), difference)
        table.add_row(*cells, style="bold" if row.apart else "")
    before, after = comparison.labels
    title = f"{comparison.run.name}: {held_out(comparison.num_tasks)} {before} and {after}"
    notes = comparison.notes
    if comparison.rows[REWARD].before.low is not None:
        notes = ["mean [95 % interval] over tasks; * marks intervals that do not overlap", *notes]
    return _framed(title, table, notes)


def runs_table(comparisons: Sequence[Comparison], digits: int = 3, measures: int = 3) -> Group:
    """One line a run: held-out results after training (the first `measures` that all share), and what training cost."""
    shown = [name for name in comparisons[0].rows if all(name in c.rows for c in comparisons)][:measures]
    table = _table("run", *map(escape, shown))
    for heading in ("joint\nactions", "\nseconds", "tokens\nsampled"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        results = [spread(comparison.rows[name].after, digits) for name in shown]
        cost = [f"{value:,.0f}" for value in comparison.run.cost().values()]
        table.add_row(Text(comparison.run.name), *results, *cost)
    notes = [f"{comparison.run.name}: {note}" for comparison in comparisons for note in comparison.notes]
    return _framed("held-out mean [95 % interval] after training, and what training cost", table, notes)


def evaluation_table(title: str, intervals: Mapping[str, Interval], notes: Sequence[str], max_reward: float | None) -> Group:
    """Results of one evaluation; the reward also in % of `max_reward`, where that is known."""
    table = _table("", "mean [95 % interval]", *["% of maximum"] * bool(max_reward))
    for name, found in intervals.items():
        share = [spread(found, 1, scale=100 / max_reward)] if max_reward and name == REWARD else []
        table.add_row(Text(name), spread(found), *share)
    return _framed(title, table, notes)


def grid_tables(comparison: grid.Comparison, digits: int = 3, measures: int = 4) -> list[Group]:
    """Per task: a line a method (over seeds), then what the method compared with gains over each other, seed by seed."""
    tables = []
    for task in comparison.tasks:
        lines = comparison.lines(task)
        threshold = comparison.grid.thresholds.get(task)
        names = [name for name in lines[0].final if name != REWARD][:measures]
        table = _table("method", "rate", "seeds", "reward", "area", *map(escape, names))
        headings = ["tokens per\nepisode", "joint\nactions", "\nseconds"]
        if threshold is not None:
            headings.insert(0, f"joint actions\nto {threshold:g}")
        for heading in headings:
            table.add_column(heading, justify="right")
        for line in lines:
            final, results = line.final, line.results
            cells = [spread(final[REWARD], digits), spread(line.area, digits)]
            cells += [spread(final[name], digits) if name in final else "" for name in names]
            if threshold is not None:
                reached = line.reached(threshold)
                count = [value for value in reached if value is not None]
                mean = f"{math.fsum(count) / len(count):,.0f}" if count else "never"
                cells.append(mean if len(count) in (0, len(reached)) else f"{mean} ({len(count)} of {len(reached)})")
            for values in ([r.tokens for r in results], [r.joint_actions for r in results], [r.seconds for r in results]):
                cells.append(f"{math.fsum(values) / len(values):,.0f}")
            rate = "" if line.rate is None else f"{line.rate:g}"
            table.add_row(Text(line.method), rate, str(len(results)), *cells)
        notes = explain({line.method: line.area for line in lines})
        notes.insert(0, "held-out mean [95 % interval] over seeds; area: mean height of the held-out curve")
        if len({result.cell.rate for result in comparison.results if result.cell.task == task} - {None}) > 1:
            notes.insert(
                1,
                "of several learning rates the one with the greatest area is shown: chosen on these very numbers, "
                "which favours trained methods over those without a rate",
            )
        failed = {line.method: sum(result.failed for result in line.results) for line in lines}
        if any(failed.values()):
            counts = ", ".join(f"{method} {count}" for method, count in failed.items() if count)
            notes.append(f"held-out episodes that failed, left out of all numbers: {counts}")
        tables.append(_framed(task, table, notes))
        tables += _critic_table(task, lines, digits)
        differences = comparison.differences(task)
        if differences:
            measures_of = list(next(iter(differences.values())))
            table = _table(f"{comparison.grid.against} minus", *map(escape, measures_of), "its final reward after")
            overtaken = comparison.overtaken(task)
            for method, parts in differences.items():
                share = overtaken.get(method)
                after = "" if method not in overtaken else "never" if share is None else f"{share:.0%} of its joint actions"
                table.add_row(Text(method), *(spread(parts[name], digits, sign="+") for name in measures_of), after)
            tables.append(
                _framed(
                    f"{task}: {comparison.grid.against} against the others",
                    table,
                    [
                        "mean [95 % interval] of differences of the same seed; of three or five seeds the bootstrap's interval "
                        "is too narrow (it covers the truth in 75 or 84 % of cases), Student's is not if differences are normal"
                    ],
                )
            )
    if comparison.missing:
        tables.append(Group(Text(f"{comparison.missing} of {len(comparison.grid.cells)} runs are still missing", style="bold")))
    return tables


def _critic_table(task: str, lines: Sequence[grid.Line], digits: int) -> list[Group]:
    """What the critics explain before each turn beside the yardstick; nothing where no method has a critic."""
    judged = [line for line in lines if line.explained]
    if not judged:
        return []
    turns = sorted({turn for line in judged for turn in line.explained})
    table = _table("method", "", "variance", *(f"before turn {turn + 1}" for turn in turns))
    for line in judged:
        for name, shares in (("critic", line.explained), ("yardstick", line.yardstick)):
            if shares:
                kind = line.results[0].judged
                table.add_row(Text(line.method), name, kind, *(spread(shares[t], digits) if t in shares else "" for t in turns))
    note = (
        "share of the return's variance, on episodes not yet trained on, second half of training, over seeds; yardstick: what "
        "a regression on the world's own numbers explains within tasks, over recent iterations, its own fit allowed for"
    )
    return [_framed(f"{task}: what the critics explain", table, [note])]


def held_out(num_tasks: int) -> str:
    return f"{num_tasks} held-out task{'' if num_tasks == 1 else 's'}"


def spread(found: Interval, digits: int = 3, *, sign: str = "", scale: float = 1.0) -> str:
    """`0.412 [0.350, 0.470]`, or the mean alone where there is no interval. `sign`: "+" marks a positive mean."""
    mean = f"{found.mean * scale:{sign}.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{found.low * scale:.{digits}f}, {found.high * scale:.{digits}f}]"


def _table(*headings: str) -> Table:
    return Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _framed(title: str, table: Table, notes: Sequence[str]) -> Group:
    """The look that all tables share: title, table, and notes as wide as the terminal."""
    return Group(Text(title, style="bold"), Text(), table, *(Text(note, style="dim") for note in notes))
