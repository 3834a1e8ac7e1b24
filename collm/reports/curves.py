"""Learning curves of one or several runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from collm.runs.files import replacing
from collm.runs.open import Run
from collm.studies.series import ceiling_by_turn, explained_by_turn, held_out_curve

COLOURS = ("#2f6fb7", "#d9732b", "#3a9157", "#b5446e", "#7b5bb0", "#8a6d3b", "#3f9aa8", "#6b6f76")
FLOOR = -1.0
"""Lower limit of the drawn explained variance, which is not bounded below at the beginning of training."""


@rc_context({"text.parse_math": False})  # a name may hold $
def draw_curves(runs: Sequence[Run], path: Path) -> Path:
    """Draw raw reward in training and on held-out tasks against joint actions; below, per run, explained variance by turn.

    A dotted line is the metric ceiling: the variance that a regression on environment metrics explains. The band around a
    held-out curve is its 95 % interval over tasks. Raises RunError or SaveError.
    """
    names = run_names(runs)
    judged = {name: turns for name, run in zip(names, runs, strict=True) if (turns := explained_by_turn(run))}
    ceilings = {name: ceiling_by_turn(run) for name, run in zip(names, runs, strict=True)}
    rows = (len(judged) + 1) // 2
    figure = Figure(figsize=(8, 4 + 2.4 * rows), dpi=150, layout="constrained")
    grid = figure.add_gridspec(1 + rows, 2, height_ratios=[4, *[2.4] * rows])
    axes = figure.add_subplot(grid[0, :])
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        _reward(axes, run, colour, ("held-out", "training") if len(runs) == 1 else (name, None))
    title = names[0] if len(runs) == 1 else "held-out tasks (thick) and training (thin)"
    dress(axes, title, "raw reward, last turn")
    for number, (name, turns) in enumerate(judged.items()):
        alone = number == len(judged) - 1 and number % 2 == 0
        below = figure.add_subplot(grid[1 + number // 2, slice(None) if alone else number % 2], sharex=axes)
        shades = colormaps["viridis"](np.linspace(0, 0.85, len(turns)))
        for (turn, (x, y)), shade in zip(turns.items(), shades, strict=True):
            below.plot(x, y, color=shade, linewidth=1.4, label=f"turn {turn + 1}")
            if turn in ceilings[name]:
                below.plot(*ceilings[name][turn], color=shade, linewidth=0.8, linestyle=":", alpha=0.8)
        lowest = min(np.nanmin(y, initial=-0.25) for _, y in turns.values())
        below.set_ylim(max(FLOOR, lowest), 1)
        below.axhline(0, color="#9aa0a6", linewidth=0.8)
        dress(below, "critic" if len(runs) == 1 else f"critic of {name}", "explained variance")
    return save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of its file name. An SVG holds its texts as text, with neither date nor random names: equal
    data give equal bytes."""
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
    with replacing(path) as aside, rc_context({"svg.hashsalt": "collm", "svg.fonttype": "none"}):
        figure.savefig(aside, format=path.suffix.removeprefix("."), metadata=metadata)
    return path


def run_names(runs: Sequence[Run]) -> list[str]:
    """The runs' names, or their paths if names repeat."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _reward(axes: Axes, run: Run, colour: str, labels: tuple[str, str | None]) -> None:
    """Draw one run's curves: training thin, held-out thick with its band."""
    steps = [record for record in run.metrics if record.get("reward/raw") is not None]
    x, y = [record["joint_actions"] for record in steps], [record["reward/raw"] for record in steps]
    axes.plot(x, y, color=colour, alpha=0.45, linewidth=0.9, label=labels[1])
    at, rewards = held_out_curve(run)
    axes.plot(at, [r.mean for r in rewards], color=colour, linewidth=2, marker="o", markersize=4, label=labels[0])
    bounds = [(x, r.low, r.high) for x, r in zip(at, rewards, strict=True) if r.low is not None and r.high is not None]
    if bounds:
        x, low, high = np.array(bounds).T
        axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def dress(axes: Axes, title: str, quantity: str) -> None:
    """Apply the common style of all curves."""
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
