"""Draws the held-out curves of docs/results from the results.json beside them: `python docs/results/draw.py [FOLDER ...]`.

The same numbers give the same file, byte for byte, with the version of matplotlib in constraints.txt.
"""

import json
import sys
from pathlib import Path

from collm.reports.grid import draw_grid
from collm.studies.grid import Grid, Study
from collm.studies.result import Cell, Result


def read(written: Path) -> Grid:
    """All runs of a results.json, whatever settings they were made with."""
    results = []
    for run in json.loads(written.read_bytes())["runs"]:
        cell = Cell(run["task"], run["method"], run["learning_rate"], run["seed"], written.parent, run["settings"])
        results.append(Result.from_plain(cell, run))
    return Grid(Study([result.cell for result in results], against=""), results)


def draw(written: Path, folder: Path) -> list[Path]:
    """`curves-TASK.svg` of every task of a results.json."""
    grid = read(written)
    return [draw_grid(grid, task, folder / f"curves-{task}.svg") for task in grid.tasks]


if __name__ == "__main__":
    here = Path(__file__).parent
    for folder in [Path(word) for word in sys.argv[1:]] or sorted(path.parent for path in here.glob("**/results.json")):
        print(*draw(folder / "results.json", folder), sep="\n")
