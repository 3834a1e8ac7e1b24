"""Learning curves of one run or several."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from collm.reports.intervals import Interval, interval
from collm.reports.tables import REWARD, scores
from collm.runs.files import replacing
from collm.runs.read import Run, read_evaluation

if TYPE_CHECKING:
    from collm.reports.grid import Comparison

COLOURS = ("#2f6fb7", "#d9732b", "#3a9157", "#b5446e", "#7b5bb0", "#8a6d3b", "#3f9aa8", "#6b6f76")
_DASHES = ((0, (6, 3)), (0, (6, 2, 1, 2)), (0, (1, 2)), (0, (3, 2, 1, 2, 1, 2)))
FLOOR = -1.0
"""Explained variance is drawn down to here: a critic that has only begun can be off by any factor."""
_EXPLAINED = {
    what: re.compile(rf"(?:.*/)?{name}_turn_(\d+)")
    for what, name in (
        ("within", "explained_within_tasks"),
        ("all", "explained_variance"),
        ("yardstick", "yardstick"),
        ("spread", "spread"),
    )
}
Curves = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Turn -> joint actions and a share of variance at each."""


@rc_context({"text.parse_math": False})  # a name may hold $
def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Raw reward in training and on held-out tasks against joint actions; below, explained variance by turn, per run, dotted
    what a regression on the world's own numbers explains.

    The band around a held-out curve is its 95 % interval over tasks. Raises RunError or SaveError.
    """
    names = run_names(runs)
    judged = {name: turns for name, run in zip(names, runs, strict=True) if (turns := explained_by_turn(run))}
    yardsticks = {name: yardstick_by_turn(run) for name, run in zip(names, runs, strict=True)}
    rows = (len(judged) + 1) // 2
    figure = Figure(figsize=(8, 4 + 2.4 * rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[4, *[2.4] * rows])
    axes = figure.add_subplot(grid[0, :])
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        _reward(axes, run, colour, ("held-out", "training") if len(runs) == 1 else (name, None))
    title = names[0] if len(runs) == 1 else "held-out tasks (thick) and training (thin)"
    _dress(axes, title, "raw reward, last turn")
    for number, (name, turns) in enumerate(judged.items()):
        alone = number == len(judged) - 1 and number % 2 == 0
        below = figure.add_subplot(grid[1 + number // 2, slice(None) if alone else number % 2], sharex=axes)
        shades = colormaps["viridis"](np.linspace(0, 0.85, len(turns)))
        for (turn, (x, y)), shade in zip(turns.items(), shades, strict=True):
            below.plot(x, y, color=shade, linewidth=1.4, label=f"turn {turn + 1}")
            if turn in yardsticks[name]:
                below.plot(*yardsticks[name][turn], color=shade, linewidth=0.8, linestyle=":", alpha=0.8)
        lowest = min(np.nanmin(y, initial=-0.25) for _, y in turns.values())
        below.set_ylim(max(FLOOR, lowest), 1)
        below.axhline(0, color="#9aa0a6", linewidth=0.8)
        _dress(below, "critic" if len(runs) == 1 else f"critic of {name}", "explained variance")
    return _save(figure, path)


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure in its file's format. An SVG holds its texts as text and neither a date nor a random name: the same
    numbers give the same bytes."""
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
    with replacing(path) as aside, rc_context({"svg.hashsalt": "collm", "svg.fonttype": "none"}):
        figure.savefig(aside, format=path.suffix.removeprefix("."), metadata=metadata)
    return path


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their paths where names repeat."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def repeats_tasks(run: Run) -> bool:
    """Whether tasks are played more than once an iteration, so that there is variance within tasks to explain: by design, or in
    at least half of the iterations (now and then it also happens by chance)."""
    within = _by_turn(run, "within")
    often = bool(within) and bool(np.isfinite(within[min(within)][1]).mean() >= 0.5)
    return often or run.config["algorithm"].get("group_size", 1) > 1


def explained_by_turn(run: Run) -> Curves:
    """The share of the return's variance within tasks that the critic explains, the mean over several critics.

    Where tasks do not repeat within an iteration it is the share of all variance, differences between tasks included. A share
    that does not exist (no variance to explain) is NaN: a gap in the curve.
    """
    found = _by_turn(run, "within" if repeats_tasks(run) else "all")
    return {turn: curve for turn, curve in found.items() if np.isfinite(curve[1]).any()}


def yardstick_by_turn(run: Run) -> Curves:
    """What least squares on the world's own numbers explains of the variance within tasks; empty where tasks do not repeat."""
    found = _by_turn(run, "yardstick") if repeats_tasks(run) else {}
    return {turn: curve for turn, curve in found.items() if np.isfinite(curve[1]).any()}


def spread_by_turn(run: Run) -> Curves:
    """How much there was to explain within tasks: squared deviations of returns from their task's mean, summed."""
    return _by_turn(run, "spread")


def _by_turn(run: Run, what: str) -> Curves:
    points: dict[int, dict[int, list[float]]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if found := _EXPLAINED[what].fullmatch(name):
                at = points.setdefault(int(found[1]), {}).setdefault(record["joint_actions"], [])
                at.append(math.nan if value is None else float(value))
    return {
        turn: (np.array(list(by_x), dtype=np.float64), np.array([np.mean(values) for values in by_x.values()]))
        for turn, by_x in sorted(points.items())
    }


def held_out_curve(run: Run) -> tuple[list[int], list[Interval]]:
    """Joint actions done at each held-out evaluation, and its reward over distinct tasks."""
    done = {record["iteration"]: record["joint_actions"] for record in run.metrics}
    evaluations = {i: path for i, path in run.evaluations().items() if i in done}
    rewards = [interval(list(scores(read_evaluation(path))[REWARD].values())) for path in evaluations.values()]
    return [done[i] for i in evaluations], rewards


def _reward(axes: Axes, run: Run, colour: str, labels: tuple[str, str | None]) -> None:
    """One run's curves: training thin, held-out thick with its band."""
    steps = [record for record in run.metrics if record.get("reward/raw") is not None]
    x, y = [record["joint_actions"] for record in steps], [record["reward/raw"] for record in steps]
    axes.plot(x, y, color=colour, alpha=0.45, linewidth=0.9, label=labels[1])
    at, rewards = held_out_curve(run)
    axes.plot(at, [r.mean for r in rewards], color=colour, linewidth=2, marker="o", markersize=4, label=labels[0])
    bounds = [(x, r.low, r.high) for x, r in zip(at, rewards, strict=True) if r.low is not None and r.high is not None]
    if bounds:
        x, low, high = np.array(bounds).T
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def _dress(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel("joint actions", fontsize=9)
    axes.set_ylabel(quantity, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#e3e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2 if len(axes.get_lines()) > 6 else 1)


@rc_context({"text.parse_math": False})  # a name may hold $
def draw_grid(comparison: Comparison, task: str, path: Path) -> Path:
    """Held-out reward of every method against joint actions: mean over seeds, each seed thin behind it. Raises SaveError.

    A method without training is a thin broken line. The legend has the methods from best to worst, by where they end. In an
    SVG the lines are named `METHOD` and `METHOD/seedS`.
    """
    figure = Figure(figsize=(9, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    widest = max((result.joint_actions for result in comparison.results if result.cell.task == task), default=1) or 1
    strokes = itertools.cycle([(colour, stroke) for stroke in ("-", (0, (4, 1))) for colour in COLOURS])
    dashes = itertools.cycle(_DASHES)
    for line in comparison.lines(task):
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
    _dress(axes, task, "held-out reward, last turn")
    named = [line for line in axes.get_lines() if not str(line.get_label()).startswith("_")]
    named.sort(key=lambda line: -float(np.asarray(line.get_ydata())[-1]))
    axes.legend(handles=named, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)
