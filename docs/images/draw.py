"""Draws the README's curve from the grids of docs/results: `python docs/images/draw.py`.

The same numbers give the same file, byte for byte, with the version of matplotlib in constraints.txt.
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from collm.reports.curves import COLOURS, dress, save_figure
from collm.studies.intervals import student

HERE = Path(__file__).parent
GRIDS = ("str_build_sparse", "str_build_sparse_again")
NAMES = {"collm-cc": "CoLLM-CC", "collm-dc": "CoLLM-DC", "magrpo": "MAGRPO"}
STEP = 768
"""Joint actions between the points at which both grids have evaluations."""


def curves() -> dict[str, np.ndarray]:
    """Method -> held-out reward of the last turn, shape (10 seeds, 6 points from 0 to 3840 joint actions)."""
    runs = [run for grid in GRIDS for run in json.loads((HERE.parent / "results" / grid / "results.json").read_text())["runs"]]
    return {
        method: np.array([[r for n, r in run["curve"] if n % STEP == 0] for run in runs if run["method"] == method])
        for method in NAMES
    }


def draw(path: Path) -> Path:
    """The mean over seeds of three methods, with Student's 95 % interval as a band. Raises SaveError."""
    figure = Figure(figsize=(7.5, 3.6), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for colour, (method, rewards) in zip(COLOURS, curves().items(), strict=False):
        found = [student(list(column)) for column in rewards.T]
        x = np.arange(len(found)) * STEP
        axes.fill_between(x, [i.low for i in found], [i.high for i in found], color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, [i.mean for i in found], color=colour, linewidth=2.2, label=NAMES[method], gid=method)
    dress(axes, "A word built in eight turns, one reward at the end", "held-out reward")
    axes.legend(frameon=False, loc="upper left")
    return save_figure(figure, path)


if __name__ == "__main__":
    print(draw(HERE / "curve.svg"))
