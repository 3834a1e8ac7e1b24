"""`collm compare`: methods x tasks x learning rates x seeds, each a run directory of its own; starts again where it stopped."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from collm.errors import ConfigError, RunError
from collm.reports.grid import WIDTH, draw_study, grid_tables
from collm.reports.screen import Screen
from collm.runs.directory import hold, read_file
from collm.runs.files import explained, refuse_links, replacing, write_text
from collm.runs.output import complain
from collm.studies.grid import Study, read_grid
from collm.studies.jobs import Job, run_jobs
from collm.studies.recipe import read_plan
from collm.studies.result import RESULTS


def run(arguments: argparse.Namespace) -> int:
    recipe: Path = arguments.recipe
    folder: Path = arguments.folder or Path("runs") / f"compare-{recipe.stem}"
    plan, jobs = read_plan(recipe, folder)
    study = Study([job.cell for job in jobs], plan.against or plan.methods[-1], plan.thresholds)
    console = Screen(stderr=True)
    if not arguments.dry_run and folder.is_dir():
        refuse_links(folder)
    for job in jobs:
        job.check_unchanged()
    by_seed = sorted(jobs, key=lambda job: plan.seeds.index(job.cell.seed))  # stopped early, all have the same seeds
    wanted = [job for job in by_seed if fnmatch(f"{job.cell.task}/{job.cell.folder.name}", arguments.only or "*")]
    if not wanted:
        raise ConfigError(f"--only {arguments.only!r} matches none of the {len(jobs)} runs; --dry-run lists them.")
    before = {result.cell for result in read_grid(study, folder / RESULTS).results}
    waiting = [job for job in wanted if job.cell not in before]
    console.print(
        f"{len(wanted)} runs, {len(wanted) - len(waiting)} of them finished before; {plan.processes} at a time in {folder}"
    )
    failed: list[Job] = []
    if not arguments.dry_run:
        copy_of_recipe = folder / "recipe.toml"
        if not copy_of_recipe.is_file() or not recipe.samefile(copy_of_recipe):
            with replacing(copy_of_recipe) as aside:
                shutil.copyfile(recipe, aside)
        failed = run_jobs(waiting, plan.processes, after_each=lambda: _write(study, folder), say=complain)
    found = read_grid(study, folder / RESULTS)
    if failed and not found.results:
        raise _failure(failed, waiting)
    if arguments.dry_run or not found.results:
        for job in wanted:
            console.print(f"{'to do   ' if job in waiting else 'finished'}  {job.cell.folder}", soft_wrap=True)
        return 0
    plain = _write(study, folder)
    files = draw_study(found, folder)
    if arguments.json:
        print(json.dumps(plain, allow_nan=False))
    else:
        Screen(width=None if sys.stdout.isatty() else WIDTH).print(*grid_tables(found), sep="\n\n")
        for path in (folder / RESULTS, *files):
            console.print(f"wrote {path}", soft_wrap=True)
    if failed:
        raise _failure(failed, waiting)
    return 0


def _write(study: Study, folder: Path) -> dict[str, Any]:
    """All that has finished into results.json, whole or not at all; two commands may work on one folder."""
    with explained(folder / RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{RESULTS}.lock").open("a")
    with lock:
        hold(lock.fileno(), str(folder), wait=True)
        plain = read_grid(study, folder / RESULTS).plain()
        write_text(folder / RESULTS, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return plain


def _failure(failed: list[Job], waiting: list[Job]) -> RunError:
    last = read_file(failed[0].log).decode(errors="replace").strip().split("\n")[-1]
    return RunError(
        f"{len(failed)} of {len(waiting)} runs failed and are missing from the results, the first with: {last} Start again to "
        "try them once more: finished runs are kept."
    )
