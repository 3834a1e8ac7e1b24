"""Held-out results as tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from collm.studies.before_after import BeforeAfter
from collm.studies.blame import Blame
from collm.studies.intervals import Interval
from collm.studies.series import REWARD
from collm.types import printable

WIDTH = 200
"""Width in columns of a table that is not printed on a terminal."""
SHOWN = 60
"""Characters of an answer's first line in a table."""


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


def cost_table(costs: Mapping[str, Mapping[str, float | None]]) -> Group:
    """Mean cost of an episode: one line per agent, and one of the team."""
    table = table_of("agent", "requests", "tokens read", "tokens sampled", "seconds")
    for who, cost in costs.items():
        cells = [
            f"{cost[name]:,.1f}" if cost[name] is not None else "unknown"
            for name in ("requests", "prompt_tokens", "sampled_tokens")
        ]
        table.add_row(Text(who), *cells, f"{cost['seconds']:.3f}", style="bold" if who == "team" else "")
    notes = [
        "requests: HTTP requests, retries included; an agent's seconds: waiting for its answers; the team's: wall clock of all "
        "episodes, played at the same time, divided by their number"
    ]
    return framed("cost per episode", table, notes)


def blame_table(name: str, found: Blame) -> Group:
    """One line per failed episode and method: the answer that cost most."""
    table = table_of("iteration", "task", "return", "by", "agent", "turn", "cost", "the answer's first line")
    for blamed in found.episodes:
        cells: list[str | Text] = [str(blamed.iteration), Text(printable(blamed.task)), f"{blamed.total:.3f}"]
        for method, fault in blamed.faults.items():
            line = printable(fault.text.strip().split("\n")[0])
            shown = line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."
            table.add_row(*cells, method, Text(fault.agent), str(fault.turn + 1), f"{fault.cost:+.3f}", Text(shown))
            cells = ["", "", ""]
    notes = []
    for method in dict.fromkeys(method for blamed in found.episodes for method in blamed.faults):
        faults = [blamed.faults[method] for blamed in found.episodes if method in blamed.faults]
        agents, turns = (Counter(part).most_common() for part in ([f.agent for f in faults], [f.turn + 1 for f in faults]))
        shares = ", ".join(f"{agent} {count}" for agent, count in agents)
        steps = ", ".join(f"turn {turn} {count}" for turn, count in turns[:4])
        notes.append(f"{method} blames of {len(faults)} episodes: {shares}; most often {steps}")
    notes.append(
        "cost: credit, minus the recorded advantage; no-op, by how much the return rises if the answer is empty and all others "
        "stay; resampling, by how much playing on after other answers of the agent returns more"
    )
    if found.mismatches:
        notes.append(f"not replayed: {found.mismatches} episodes, whose replay differs from the record (hidden randomness)")
    title = f"{name}: {len(found.episodes)} failed of {found.num_read} recorded episodes"
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
