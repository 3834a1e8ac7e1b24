"""A study as tables and curves."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Group
from rich.markup import escape
from rich.text import Text

from collm.reports.curves import COLOURS, dress, save_figure
from collm.reports.screen import Screen
from collm.reports.tables import WIDTH, framed, spread, table_of
from collm.runs.files import write_text
from collm.studies.grid import Grid, Line
from collm.studies.intervals import explain
from collm.studies.series import REWARD

_DASHES = ((0, (6, 3)), (0, (6, 2, 1, 2)), (0, (1, 2)), (0, (3, 2, 1, 2, 1, 2)))


def draw_study(grid: Grid, folder: Path) -> list[Path]:
    """Write `table.txt` and `curves-TASK.svg` of every task; returns the paths of the pictures. Raises SaveError."""
    pictures = [draw_grid(grid, task, folder / f"curves-{task}.svg") for task in grid.tasks]
    text = io.StringIO()
    Screen(file=text, width=WIDTH).print(*grid_tables(grid), sep="\n\n")
    write_text(folder / "table.txt", text.getvalue())
    return pictures


def grid_tables(grid: Grid, digits: int = 3, measures: int = 4) -> list[Group]:
    """The tables of each task: one line per method (over seeds), the variance that critics explain, and the differences between
    `against` and every other method, paired by seed."""
    tables = []
    for task in grid.tasks:
        lines = grid.lines(task)
        tables.append(_results(grid, task, lines, digits, measures))
        tables += _critics(task, lines, digits)
        tables += _differences(grid, task, digits)
    if grid.missing:
        tables.append(Group(Text(f"{grid.missing} of {len(grid.study.cells)} runs are still missing", style="bold")))
    return tables


def _results(grid: Grid, task: str, lines: Sequence[Line], digits: int, measures: int) -> Group:
    """One line per method: results after training (the first `measures` metrics) and the cost of training."""
    threshold = grid.study.thresholds.get(task)
    names = [name for name in lines[0].final if name != REWARD][:measures]
    table = table_of("method", "rate", "seeds", "reward", "area", *map(escape, names))
    judged = any(line.fidelity for line in lines)
    for heading in ("credit\nfidelity", "its\nceiling") if judged else ():
        table.add_column(heading)
    headings = ["tokens per\nepisode", "joint\nactions", "\nseconds"]
    if threshold is not None:
        headings.insert(0, f"joint actions\nto {threshold:g}")
    for heading in headings:
        table.add_column(heading, justify="right")
    for line in lines:
        final, results = line.final, line.results
        cells = [spread(final[REWARD], digits), spread(line.area, digits)]
        cells += [spread(final[name], digits) if name in final else "" for name in names]
        if judged:
            cells += [spread(line.fidelity[name], digits) if line.fidelity else "" for name in ("pearson", "ceiling")]
        if threshold is not None:
            reached = line.reached(threshold)
            count = [value for value in reached if value is not None]
            mean = f"{math.fsum(count) / len(count):,.0f}" if count else "never"
            cells.append(mean if len(count) in (0, len(reached)) else f"{mean} ({len(count)} of {len(reached)})")
        for values in ([r.tokens for r in results], [r.joint_actions for r in results], [r.seconds for r in results]):
            cells.append(f"{math.fsum(values) / len(values):,.0f}")
        rate = "" if line.rate is None else f"{line.rate:g}"
        table.add_row(Text(line.method), rate, str(len(results)), *cells)
    notes = ["held-out mean [95 % interval] over seeds; area: mean height of the held-out curve"]
    if len({result.cell.rate for result in grid.results if result.cell.task == task} - {None}) > 1:
        notes.append(
            "the learning rate with the greatest area is shown; it was chosen on the same data, "
            "which favours trained methods over those without a rate"
        )
    if judged:
        notes.append(
            "credit fidelity: Pearson's correlation of advantages with counterfactual truth at half of the training; its "
            "ceiling: what an advantage without noise could reach"
        )
    notes += explain({line.method: line.area for line in lines})
    failed = {line.method: sum(result.failed for result in line.results) for line in lines}
    if any(failed.values()):
        counts = ", ".join(f"{method} {count}" for method, count in failed.items() if count)
        notes.append(f"held-out episodes that failed, left out of all numbers: {counts}")
    return framed(task, table, notes)


def _critics(task: str, lines: Sequence[Line], digits: int) -> list[Group]:
    """What the critics explain before each turn beside the metric ceiling; nothing where no method has a critic."""
    judged = [line for line in lines if line.explained]
    if not judged:
        return []
    turns = sorted({turn for line in judged for turn in line.explained})
    table = table_of("method", "", "variance", *(f"before turn {turn + 1}" for turn in turns))
    for line in judged:
        for name, shares in (("critic", line.explained), ("ceiling", line.ceiling)):
            if shares:
                kind = line.results[0].judged
                table.add_row(Text(line.method), name, kind, *(spread(shares[t], digits) if t in shares else "" for t in turns))
    note = (
        "share of the return's variance, on episodes not yet trained on, second half of training, over seeds; ceiling: what "
        "a regression on the environment metrics explains within tasks, over recent iterations, its own fit allowed for"
    )
    return [framed(f"{task}: what the critics explain", table, [note])]


def _differences(grid: Grid, task: str, digits: int) -> list[Group]:
    """The differences between `against` and every other method; empty if `against` or all others have not finished."""
    differences, against = grid.differences(task), grid.study.against
    if not differences:
        return []
    measures = list(next(iter(differences.values())))
    table = table_of(f"{against} minus", *map(escape, measures), "p", "p by Holm")
    p_values = grid.p_values(task)
    for method, parts in differences.items():
        ps = ["" if math.isnan(p) else f"{p:.3f}" for p in p_values[method]]
        table.add_row(Text(method), *(spread(parts[name], digits, sign="+") for name in measures), *ps)
    note = (
        "mean [95 % interval] of differences paired by seed; with three or five seeds the bootstrap's interval is too narrow "
        "(it covers the true mean in 75 or 84 % of cases), Student's is not if differences are normal; p: Student's, of the "
        "area; by Holm: for all methods of this table together, not for a choice among learning rates"
    )
    return [framed(f"{task}: {against} against the others", table, [note])]


@rc_context({"text.parse_math": False})  # a name may hold $
def draw_grid(grid: Grid, task: str, path: Path) -> Path:
    """Draw held-out reward of every method against joint actions: the mean over seeds, and each seed as a thin line.

    A method without training is a thin dashed line. The legend lists the methods from best to worst final reward. In an SVG the
    lines have the ids `METHOD` and `METHOD/seedS`. Raises SaveError.
    """
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    widest = max((result.joint_actions for result in grid.results if result.cell.task == task), default=1) or 1
    strokes = itertools.cycle([(colour, stroke) for stroke in ("-", (0, (4, 1))) for colour in COLOURS])
    dashes = itertools.cycle(_DASHES)
    for line in grid.lines(task):
        method = line.method
        if all(len(result.joint_actions_K) == 1 for result in line.results):
            height = float(np.mean([result.rewards_K[0] for result in line.results]))
            axes.plot([0, widest], [height] * 2, color="#3b3f45", linewidth=1, linestyle=next(dashes), label=method, gid=method)
            continue
        colour, stroke = next(strokes)
        for result in line.results:
            name = f"{method}/seed{result.cell.seed}"
            axes.plot(result.joint_actions_K, result.rewards_K, color=colour, alpha=0.25, linewidth=0.7, gid=name)
        x = np.unique(np.concatenate([result.joint_actions_K for result in line.results]))
        shared = x[x <= min(result.joint_actions_K[-1] for result in line.results)]
        heights = np.mean([np.interp(shared, result.joint_actions_K, result.rewards_K) for result in line.results], axis=0)
        axes.plot(shared, heights, color=colour, linewidth=2.2, linestyle=stroke, label=method, gid=method)
    dress(axes, task, "held-out reward, last turn")
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    named.sort(key=lambda line: -float(np.asarray(line.get_ydata())[-1]))
    axes.legend(handles=named, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return save_figure(figure, path)
