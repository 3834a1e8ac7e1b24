"""Held-out results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from collm.studies.before_after import BeforeAfter
from collm.studies.intervals import Interval
from collm.studies.series import REWARD


def comparison_table(comparison: BeforeAfter, digits: int = 3) -> Group:
    """Results before and after training, one line per measure."""
    table = table_of("", "before", "after", "difference")
    for name, row in comparison.rows.items():
        difference = spread(row.difference, digits, sign="+") + (" *" if row.apart else "")
        cells = (Text(name), spread(row.before, digits), spread(row.after, digits), difference)
        table.add_row(*cells, style="bold" if row.apart else "")
    before, after = comparison.labels
    title = f"{comparison.run.name}: {held_out(comparison.num_tasks)} {before} and {after}"
    notes = comparison.notes
    if comparison.rows[REWARD].before.low is not None:
        notes = ["mean [95 % interval] over tasks; * marks intervals that do not overlap", *notes]
    return framed(title, table, notes)


def runs_table(comparisons: Sequence[BeforeAfter], digits: int = 3, measures: int = 3) -> Group:
    """One line per run: held-out results after training (the first `measures` that all runs have) and the cost of training."""
    shown = [name for name in comparisons[0].rows if all(name in c.rows for c in comparisons)][:measures]
    table = table_of("run", *map(escape, shown))
    for heading in ("joint\nactions", "\nseconds", "tokens\nsampled"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        results = [spread(comparison.rows[name].after, digits) for name in shown]
        cost = [f"{value:,.0f}" for value in comparison.cost.values()]
        table.add_row(Text(comparison.run.name), *results, *cost)
    notes = [f"{comparison.run.name}: {note}" for comparison in comparisons for note in comparison.notes]
    return framed("held-out mean [95 % interval] after training, and the cost of training", table, notes)


def evaluation_table(title: str, intervals: Mapping[str, Interval], notes: Sequence[str], max_reward: float | None) -> Group:
    """Results of one evaluation; the reward also in % of `max_reward`, if that is known."""
    table = table_of("", "mean [95 % interval]", *["% of maximum"] * bool(max_reward))
    for name, found in intervals.items():
        share = [spread(found, 1, scale=100 / max_reward)] if max_reward and name == REWARD else []
        table.add_row(Text(name), spread(found), *share)
    return framed(title, table, notes)


def held_out(num_tasks: int) -> str:
    return f"{num_tasks} held-out task{'' if num_tasks == 1 else 's'}"


def spread(found: Interval, digits: int = 3, *, sign: str = "", scale: float = 1.0) -> str:
    """`0.412 [0.350, 0.470]`, or only the mean without an interval. `sign`: "+" marks a positive mean."""
    mean = f"{found.mean * scale:{sign}.{digits}f}"
    if found.low is None or found.high is None:
        return mean
    return f"{mean} [{found.low * scale:.{digits}f}, {found.high * scale:.{digits}f}]"


def table_of(*headings: str) -> Table:
    """An empty table in the common style of all tables."""
    return Table(*headings, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def framed(title: str, table: Table, notes: Sequence[str]) -> Group:
    """A title, a table and notes."""
    return Group(Text(title, style="bold"), Text(), table, *(Text(note, style="dim") for note in notes))
