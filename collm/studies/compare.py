"""`collm.compare`: run a study and return its results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from collm.errors import ConfigError, RunError
from collm.runs.directory import read_file
from collm.runs.files import refuse_links, replacing
from collm.runs.output import complain
from collm.studies.grid import Grid, Study, read_grid, write_results
from collm.studies.jobs import SEEN, Begin, StudyJob, begin_here, run_jobs
from collm.studies.recipe import read_plan
from collm.studies.result import RESULTS


def compare(
    recipe: str | Path,
    *,
    folder: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    only: str = "*",
    quiet: bool = False,
) -> Grid:
    """Run all methods x tasks x learning rates x seeds of a recipe, each run in a separate process.

    A second call does not repeat finished runs and resumes interrupted ones. `results.json` in the folder is written after
    every run; `collm.reports.grid.draw_study` adds the tables and curves of `collm compare`.

        grid = collm.compare("recipes/compare/agree.toml", overrides={"run.iterations": 20}, workers=2)
        grid.line("agree", "collm-cc").reward      # Interval(mean=0.9, low=0.8, high=1.0, num_tasks=3, note="")

    Args:
        folder: the folder of runs and results; default: `runs/compare-RECIPE`.
        overrides: `{"room.key": value}`, applied after the settings of the tasks and before those of [methods.NAME];
            "compare.KEY" replaces a value of the table [compare].
        workers: runs at the same time; default: `compare.processes`.
        cluster: address of a Ray cluster whose nodes have the runs (docs/comparing.md); default: `compare.cluster`.
        only: a pattern that TASK/NAME of a run must match.
        quiet: do not print progress.
    Raises: ConfigError before anything is started; RunError where the folder holds other settings, or all runs have failed.
        If only some runs failed, `Grid.failure` holds how many and why.
    """
    todo = schedule(recipe, folder=folder, overrides=overrides, workers=workers, cluster=cluster, only=only)
    say = _silent if quiet else complain
    if todo.folder.is_dir():
        refuse_links(todo.folder)
    say(todo.headline)
    source, kept = Path(recipe), todo.folder / "recipe.toml"
    if not kept.is_file() or not source.samefile(kept):
        with replacing(kept) as aside:
            shutil.copyfile(source, aside)
    with _places(todo, say) as begin:
        failed = run_jobs(
            todo.waiting,
            todo.workers,
            begin=begin,
            patience=0 if todo.cluster is None else SEEN,
            after_each=lambda: write_results(todo.study, todo.folder),
            say=say,
        )
    failure = _failure(failed, todo.waiting) if failed else ""
    if failure and not read_grid(todo.study, todo.folder / RESULTS).results:
        raise RunError(failure)
    return replace(write_results(todo.study, todo.folder), failure=failure)


@contextmanager
def _places(todo: Schedule, say: Callable[[str], None]) -> Iterator[Begin]:
    """Begins runs on this machine, or on the nodes of the study's cluster."""
    if todo.cluster is None or not todo.waiting:
        yield begin_here
        return
    from collm.cluster.commands import Commands

    configs = [job.config for job in todo.waiting]
    kinds = {config.run.device.partition(":")[0] for config in configs}
    device = "cuda" if "cuda" in kinds else "cpu" if kinds == {"cpu"} else "auto"
    restarts = min(config.cluster.restarts for config in configs)
    with closing(
        Commands.connect(todo.cluster, device, todo.folder, at_once=todo.workers, restarts=restarts, say=say)
    ) as commands:
        yield commands.begin


@dataclass(frozen=True, slots=True)
class Schedule:
    """The runs of one call of `compare`."""

    study: Study
    folder: Path
    workers: int
    """Runs at the same time."""
    cluster: str | None
    """Address of the Ray cluster that has the runs; None: this machine."""
    wanted: Sequence[StudyJob]
    """The requested runs, ordered by seed, so that after an early stop all methods have the same seeds."""
    waiting: Sequence[StudyJob]
    """The requested runs that have not finished."""

    @property
    def headline(self) -> str:
        finished = len(self.wanted) - len(self.waiting)
        return f"{len(self.wanted)} runs, {finished} of them already finished; {self.workers} at a time in {self.folder}"


def schedule(
    recipe: str | Path,
    *,
    folder: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    only: str = "*",
) -> Schedule:
    """Check all settings without starting a run. Arguments and errors are those of `compare`."""
    recipe = Path(recipe)
    folder = default_folder(recipe) if folder is None else Path(folder)
    overrides = dict(overrides or {})
    for name, value in (("compare.processes", workers), ("compare.cluster", cluster)):
        overrides |= {} if value is None else {name: value}
    settings, jobs = read_plan(recipe, folder, overrides)
    study = Study([job.cell for job in jobs], settings.against or settings.methods[-1], settings.thresholds)
    for job in jobs:
        job.check_unchanged()
    by_seed = sorted(jobs, key=lambda job: settings.seeds.index(job.cell.seed))
    wanted = [job for job in by_seed if fnmatch(f"{job.cell.task}/{job.cell.folder.name}", only)]
    if not wanted:
        raise ConfigError(f"--only {only!r} matches none of the {len(jobs)} runs; --dry-run lists them.")
    finished = {result.cell for result in read_grid(study, folder / RESULTS).results}
    waiting = [job for job in wanted if job.cell not in finished]
    return Schedule(study, folder, settings.processes, settings.cluster, wanted, waiting)


def default_folder(recipe: Path) -> Path:
    """The default folder of a comparison."""
    return Path("runs") / f"compare-{recipe.stem}"


def _failure(failed: Sequence[StudyJob], waiting: Sequence[StudyJob]) -> str:
    last = read_file(failed[0].log).decode(errors="replace").strip().split("\n")[-1]
    return (
        f"{len(failed)} of {len(waiting)} runs failed and are missing from the results, the first with: {last} Start again to "
        "try them once more: finished runs are kept."
    )


def _silent(text: str) -> None:
    pass
