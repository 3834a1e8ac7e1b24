"""The rows of a grid's table in Markdown, from its results.json: `python docs/results/table.py docs/results/real/quote`."""

import sys
from pathlib import Path

from draw import read

from collm.studies.grid import Grid, Line
from collm.studies.intervals import Interval, interval, student
from collm.studies.series import REWARD


def rows(grid: Grid, task: str, against: str) -> list[str]:
    """Per method: seeds, each seed's final reward, the mean final reward and area, and the area of `against` minus its own."""
    lines = grid.lines(task)
    reference = {result.cell.seed: result.area for result in grid.line(task, against).results}
    head = ["method", "final reward by seed", "mean", "area", f"area of {against} minus it", "Student's"]
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(_row(line, reference) for line in lines))]


def _row(line: Line, reference: dict[int, float]) -> list[str]:
    final = [result.final[REWARD] for result in line.results]
    areas = [result.area for result in line.results]
    more = [reference[result.cell.seed] - result.area for result in line.results if result.cell.seed in reference]
    both = ["", ""]
    if any(more) and len(more) > 1:
        both = [_shown(interval(more, fewest=3, unit="seed")), _shown(student(more, fewest=2, unit="seed"))]
    numbers = [f"{sum(values) / len(values):.3f}" for values in (final, areas)]
    return [f"`{line.method}`", " ".join(f"{value:.3f}" for value in final), *numbers, *both]


def _shown(found: Interval) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.3f}"
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


if __name__ == "__main__":
    folder, against = Path(sys.argv[1]), sys.argv[2]
    found = read(folder / "results.json")
    for task in found.tasks:
        print(*rows(found, task, against), sep="\n")
