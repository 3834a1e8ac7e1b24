"""The rows of a grid's table in Markdown: `python docs/results/table.py docs/results/real/quote collm-cc`.

Where texts.json has every run, the table also compares final rewards text by text. A grid whose answers were judged has a
table of credit fidelity instead.
"""

import json
import sys
from pathlib import Path

import numpy as np
from draw import read

from collm.studies.grid import Line
from collm.studies.intervals import Interval, holm, interval, student, student_p
from collm.studies.series import REWARD


def rows(folder: Path, against: str) -> list[str]:
    """The table of the folder's kind of grid."""
    judged = any(result.fidelity for result in read(folder / "results.json").results)
    return (judged_rows if judged else reward_rows)(folder, against)


def reward_rows(folder: Path, against: str) -> list[str]:
    """Per method: each seed's final reward, their mean, the area, and what `against` has more.

    Differences of areas are paired by seed, with the bootstrap's interval (from three seeds on) and Student's. Differences of
    final rewards are means over seeds, paired by held-out task, with both intervals over tasks.
    """
    grid, written = read(folder / "results.json"), folder / "texts.json"
    (task,) = grid.tasks
    lines, reference = grid.lines(task), grid.line(task, against)
    texts = json.loads(written.read_text()) if written.exists() else {}
    by_text = all(_name(line, seed) in texts for line in lines for seed in line.seeds)
    head = ["method", "final reward by seed", "mean", "area", f"area of {against} minus it", "Student's"]
    head += [f"final reward of {against} minus it, over texts", "Student's"] if by_text else []
    table = [head, ["---"] * len(head)]
    for line in lines:
        final, areas = [result.final[REWARD] for result in line.results], [result.area for result in line.results]
        cells = [f"`{line.method}`", " ".join(f"{value:.3f}" for value in final)]
        cells += [f"{np.mean(values):.3f}" for values in (final, areas)]
        if line.method == against:
            cells += [""] * (len(head) - len(cells))
        else:
            own = {result.cell.seed: result.area for result in reference.results}
            cells += _both([own[seed] - area for seed, area in zip(line.seeds, areas, strict=True)], "seed")
            if by_text:
                ours, theirs = _rewards(texts, reference), _rewards(texts, line)
                cells += _both([ours[task] - theirs[task] for task in sorted(ours.keys() | theirs.keys())], "task")
        table.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in table]


def judged_rows(folder: Path, against: str) -> list[str]:
    """Per task and method: the area, credit fidelity by seed, its mean and ceiling, and what that of `against` is more.

    Differences are paired by seed, with Student's interval; p is Student's, by Holm for all methods of the task.
    """
    grid = read(folder / "results.json")
    head = ["task", "method", "area", "credit fidelity by seed", "mean", "ceiling"]
    head += [f"that of `{against}` minus it", "p by Holm"]
    table = [head, ["---"] * len(head)]
    for task in sorted(grid.tasks):
        ours = _judged(grid.line(task, against))
        lines = sorted(grid.lines(task), key=lambda line: line.method)
        more = {
            line.method: [ours[seed] - own for seed, own in _judged(line).items()] for line in lines if line.method != against
        }
        corrected = dict(zip(more, holm([student_p(values) for values in more.values()]), strict=True))
        for line in lines:
            values, method = list(_judged(line).values()), line.method
            cells = [f"`{task}`", f"`{method}`", f"{np.mean([result.area for result in line.results]):.3f}"]
            cells += [" ".join(f"{value:.2f}" for value in values), f"{np.mean(values):.2f}"]
            cells += [f"{line.fidelity['ceiling'].mean:.2f}", "", ""]
            if method != against:
                cells[-2:] = [_shown(student(more[method], fewest=2, unit="seed"), 2), f"{corrected[method]:.2f}"]
            table.append(cells)
    return [f"| {' | '.join(cells)} |" for cells in table]


def _judged(line: Line) -> dict[int, float]:
    """Seed -> credit fidelity."""
    return {result.cell.seed: result.fidelity["pearson"]["mean"] for result in line.results if result.fidelity}


def _name(line: Line, seed: int) -> str:
    return f"{line.method}-seed{seed}" if line.rate is None else f"{line.method}-lr{line.rate:g}-seed{seed}"


def _rewards(texts: dict, line: Line) -> dict[str, float]:
    """Held-out task -> final reward, the mean over seeds."""
    runs = [texts[_name(line, seed)]["rewards"] for seed in line.seeds]
    return {task: float(np.mean([run[task] for run in runs])) for task in runs[0]}


def _both(values: list[float], unit: str) -> list[str]:
    return [_shown(interval(values, fewest=3, unit=unit)), _shown(student(values, fewest=2, unit=unit))]


def _shown(found: Interval, digits: int = 3) -> str:
    if found.low is None or found.high is None:
        return f"{found.mean:+.{digits}f}"
    return "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(found.mean, found.low, found.high, n=digits)


if __name__ == "__main__":
    print(*rows(Path(sys.argv[1]), sys.argv[2]), sep="\n")
