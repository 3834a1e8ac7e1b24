"""`collm report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from collm.reports.builds import choose, draw_builds, picture
from collm.reports.curves import draw_curves
from collm.reports.runs import read_run
from collm.reports.tables import compare, comparison_table, runs_table


def run(arguments: argparse.Namespace) -> int:
    folders = {folder.resolve(): folder for folder in arguments.runs}
    comparisons = [compare(read_run(folder)) for folder in folders.values()]
    console = Console(highlight=False, quiet=arguments.json)
    if not console.is_terminal:
        console.width = max(console.width, 120)
    reports = []
    for comparison in comparisons:
        files = [draw_curves([comparison.run], comparison.run.folder / "report" / "curves.png")]
        console.print(comparison_table(comparison))
        gallery = choose(comparison.before, comparison.after)
        if gallery is not None:
            labels = comparison.labels
            files.append(draw_builds(gallery, comparison.run.name, labels, comparison.run.folder / "report" / "builds.png"))
            if len(comparisons) == 1:
                console.print()
                console.print(picture(gallery, labels, console.width))
        console.print()
        _list(console, files)
        reports.append({**comparison.plain(), "files": [str(path) for path in files]})
    files = []
    if len(comparisons) > 1:
        runs = [comparison.run for comparison in comparisons]
        files = [draw_curves(runs, runs[0].folder / "report" / "curves-of-runs.png")]
        console.print(runs_table(comparisons))
        console.print()
        _list(console, files)
    if arguments.json:
        print(json.dumps({"runs": reports, "files": [str(path) for path in files]}, allow_nan=False))
    return 0


def _list(console: Console, files: list[Path]) -> None:
    for path in files:
        console.print(str(path), soft_wrap=True, markup=False)
