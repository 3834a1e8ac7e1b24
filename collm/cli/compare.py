"""`collm compare`."""

from __future__ import annotations

import argparse
import json
import sys

from collm.errors import RunError
from collm.reports.grid import draw_study, grid_tables
from collm.reports.screen import Screen
from collm.reports.tables import WIDTH
from collm.studies.compare import compare, default_folder, schedule
from collm.studies.result import RESULTS


def run(arguments: argparse.Namespace) -> int:
    recipe, only, cluster = arguments.recipe, arguments.only or "*", arguments.cluster
    folder = arguments.folder or default_folder(recipe)
    console = Screen(stderr=True)
    if arguments.dry_run:
        todo = schedule(recipe, folder=folder, cluster=cluster, only=only)
        console.print(todo.headline)
        for job in todo.wanted:
            console.print(f"{'to do   ' if job in todo.waiting else 'finished'}  {job.cell.folder}", soft_wrap=True)
        return 0
    grid = compare(recipe, folder=folder, cluster=cluster, only=only)
    pictures = draw_study(grid, folder)
    if arguments.json:
        print(json.dumps(grid.plain(), allow_nan=False))
    else:
        Screen(width=None if sys.stdout.isatty() else WIDTH).print(*grid_tables(grid), sep="\n\n")
        for path in (folder / RESULTS, *pictures):
            console.print(f"wrote {path}", soft_wrap=True)
    if grid.failure:
        raise RunError(grid.failure)
    return 0
