"""`collm compare`: methods x tasks x learning rates x seeds, each a run directory of its own; starts again where it stopped.

Every run is a process of its own (training/cell.py). What is finished is never repeated, what was cut off resumes exactly. The
numbers are put together by reports/grid.py.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm.errors import ConfigError, RunError
from collm.reports.curves import draw_grid
from collm.reports.grid import Cell, Grid, read_grid, read_result
from collm.reports.screen import Screen
from collm.reports.tables import REWARD, grid_tables
from collm.runs.directory import hold, ignored, read_file
from collm.runs.files import explained, refuse_links, replacing, write_text
from collm.settings.checks import CRITIC_ONLY
from collm.settings.former import ADDED
from collm.settings.load import apply_overrides, parse_config
from collm.settings.presets import ALGORITHMS
from collm.settings.rooms import Config

UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "raw": ("one untrained agent alone", {"env.agents": 1, "rollout.protocol": "single"}),
    "parallel": ("untrained agents, all at once", {"rollout.protocol": "parallel"}),
    "pipeline": ("untrained agents, each reading those before it", {"rollout.protocol": "pipeline"}),
    "discussion": ("untrained agents after a round of messages", {"rollout.protocol": "discussion"}),
}
ALONE = ("ac", "grpo")
"""Algorithms that train one agent: the task is made for one."""


RESULTS = "results.json"


class Plan(BaseModel):
    """The table [compare] of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)
    methods: list[str] = Field(min_length=1)
    """Algorithms, raw, parallel, pipeline, discussion, or names of [methods.NAME]."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Every method trains once with each."""
    learning_rates: list[float] = []
    """The grid, of agents and critics alike, that every trained method goes through; default: the task's own."""
    processes: int = Field(1, ge=1)
    """Runs at a time."""
    against: str | None = None
    """The method that the others are compared with, seed by seed; default: the last of `methods`."""
    thresholds: dict[str, float] = {}
    """Task -> held-out reward; the table says after how many joint actions a method reaches it."""


@dataclass(frozen=True, slots=True)
class Job:
    """One cell and how it is made: the complete settings, and whether there is anything to train."""

    cell: Cell
    config: Config
    trained: bool

    @property
    def finished(self) -> bool:
        return (self.cell.folder / "final").is_dir()

    @property
    def settings(self) -> Path:
        """Where the cell's settings lie, beside its run directory."""
        return Path(f"{self.cell.folder}.json")

    def check_unchanged(self) -> None:
        """Raises RunError where the cell was begun with other settings: numbers of two recipes never mix."""
        if not os.path.lexists(self.settings):
            return
        try:
            digest = _digest(json.loads(read_file(self.settings)), self.trained)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{str(self.settings)!r} cannot be read: {error!r}. Remove it and {str(self.cell.folder)!r} to run it anew."
            ) from error
        if digest != self.cell.settings:
            raise RunError(
                f"{self.cell.folder} was begun with other settings than the recipe now has. Choose another --folder, or remove "
                f"it, {self.settings.name} and {RESULTS} to run it anew."
            )


def _digest(settings: Mapping[str, Any], trained: bool) -> str:
    """Of all settings that make numbers: not where the run lies, nor how to learn where nothing learns, nor, at the value that
    leaves all as it was, one that came later than the first grids."""
    counted = {room: dict(values) for room, values in settings.items()}
    counted["run"]["folder"] = None
    for (room, key), before in ADDED.items():
        if counted[room].get(key) == before:
            del counted[room][key]
    if not trained:
        counted = {room: values for room, values in counted.items() if room not in ("algorithm", "critic", "learner")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


def run(arguments: argparse.Namespace) -> int:
    recipe: Path = arguments.recipe
    folder: Path = arguments.folder or Path("runs") / f"compare-{recipe.stem}"
    plan, jobs = read_plan(recipe, folder)
    grid = Grid([job.cell for job in jobs], plan.against or plan.methods[-1], plan.thresholds)
    console = Screen(stderr=True)
    if not arguments.dry_run and folder.is_dir():
        refuse_links(folder)
    for job in jobs:
        job.check_unchanged()
    by_seed = sorted(jobs, key=lambda job: plan.seeds.index(job.cell.seed))  # stopped early, all have the same seeds
    wanted = [job for job in by_seed if fnmatch(f"{job.cell.task}/{job.cell.folder.name}", arguments.only or "*")]
    if not wanted:
        raise ConfigError(f"--only {arguments.only!r} matches none of the {len(jobs)} runs; --dry-run lists them.")
    before = {result.cell for result in read_grid(grid, folder / RESULTS).results}
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
        failed = work(waiting, plan.processes, console, lambda: _write(grid, folder))
    found = read_grid(grid, folder / RESULTS)
    if failed and not found.results:
        raise _failure(failed, waiting)
    if arguments.dry_run or not found.results:
        for job in wanted:
            console.print(f"{'to do   ' if job in waiting else 'finished'}  {job.cell.folder}", soft_wrap=True)
        return 0
    plain = _write(grid, folder)
    files = [draw_grid(found, task, folder / f"curves-{task}.svg") for task in found.tasks]
    tables = grid_tables(found)
    text = io.StringIO()
    Screen(file=text, width=200).print(*tables, sep="\n\n")
    write_text(folder / "table.txt", text.getvalue())
    if arguments.json:
        print(json.dumps(plain, allow_nan=False))
    else:
        Screen(width=None if sys.stdout.isatty() else 200).print(*tables, sep="\n\n")
        for path in (folder / RESULTS, *files):
            console.print(f"wrote {path}", soft_wrap=True)
    if failed:
        raise _failure(failed, waiting)
    return 0


def _write(grid: Grid, folder: Path) -> dict[str, Any]:
    """All that has finished into results.json, whole or not at all; two commands may work on one folder."""
    with explained(folder / RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{RESULTS}.lock").open("a")
    with lock:
        hold(lock.fileno(), str(folder), wait=True)
        plain = read_grid(grid, folder / RESULTS).plain()
        write_text(folder / RESULTS, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return plain


def _failure(failed: list[Job], waiting: list[Job]) -> RunError:
    last = read_file(Path(f"{failed[0].cell.folder}.log")).decode(errors="replace").strip().split("\n")[-1]
    return RunError(
        f"{len(failed)} of {len(waiting)} runs failed and are missing from the results, the first with: {last} Start again to "
        "try them once more: finished runs are kept."
    )


def read_plan(recipe: Path, folder: Path) -> tuple[Plan, list[Job]]:
    """The recipe's plan and every run it asks for. Raises ConfigError before anything is started."""
    values = _read_toml(recipe)
    unknown = sorted(values.keys() - {"compare", "settings", "tasks", "methods"})
    if unknown:
        raise ConfigError(
            f"{recipe}: unknown table [{unknown[0]}]; there are [compare], [settings], [tasks.NAME], [methods.NAME]."
        )
    if not isinstance(values.get("compare"), dict):
        raise ConfigError(f"{recipe} has no table [compare]: say there which methods and seeds to run.")
    try:
        plan = Plan.model_validate(values["compare"])
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{recipe}: compare.{name}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
    tasks, methods = values.get("tasks") or {}, values.get("methods") or {}
    if not tasks:
        raise ConfigError(f"{recipe} names no task: write [tasks.NAME] with recipe = '...' or env = {{name = '...'}}.")
    for name in tasks:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(f"{recipe}: [tasks.{name!r}] cannot name a folder. Use letters, digits, '.', '_' and '-'.")
    for kind, named, known in (
        ("against", [plan.against or plan.methods[-1]], plan.methods),
        ("thresholds", plan.thresholds, tasks),
    ):
        for name in named:
            if name not in known:
                raise ConfigError(f"{recipe}: compare.{kind} names {name!r}, which is none of {', '.join(known)}.")
    jobs = []
    for task, method in itertools.product(tasks, plan.methods):
        trained = method not in UNTRAINED
        rates: list[float | None] = [*plan.learning_rates] if trained and plan.learning_rates else [None]
        for rate, seed in itertools.product(rates, plan.seeds):
            cell = Cell(task, method, rate, seed, folder / task / _name(method, rate, seed))
            config = _settings(recipe, values.get("settings") or {}, tasks[task], methods, cell)
            jobs.append(Job(replace(cell, settings=_digest(config.resolved(), trained)), config, trained))
    return plan, jobs


def work(waiting: list[Job], processes: int, console: Screen, after_each: Callable[[], Any]) -> list[Job]:
    """Run the jobs, `processes` at a time, and return those that failed."""
    started, done = time.monotonic(), 0
    failed: list[Job] = []
    running: dict[subprocess.Popen[bytes], Job] = {}
    queue = list(waiting)
    with _stoppable(running):
        while queue or running:
            while queue and len(running) < processes:
                job = queue.pop(0)
                running[_start(job)] = job
            time.sleep(0.05)
            for process in [p for p in running if p.poll() is not None]:
                job = running.pop(process)
                done += 1
                if process.returncode or not job.finished:
                    failed.append(job)
                    console.print(f"failed: {job.cell.folder}; see {job.cell.folder}.log", style="bold", soft_wrap=True)
                left = (time.monotonic() - started) / done * (len(waiting) - done) / 60
                numbers = "" if job in failed else f"  reward {read_result(job.cell).final[REWARD]:.3f}"
                name = f"{job.cell.task} {job.cell.folder.name}"
                console.print(f"{done}/{len(waiting)}  {name}{numbers}  {left:.1f} min left", soft_wrap=True)
                after_each()
    return failed


def _start(job: Job) -> subprocess.Popen[bytes]:
    """Begin or continue one cell in a process that dies with this one."""
    folder = job.cell.folder
    log = Path(f"{folder}.log")
    write_text(job.settings, json.dumps(job.config.resolved(), indent=1))
    kind = "train" if job.trained else "evaluate"
    command = [sys.executable, "-m", "collm.training.cell", kind, str(job.settings), str(folder)]
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, preexec_fn=_die_with_parent
        )


def _die_with_parent() -> None:
    """Linux: a run gets SIGTERM, and saves, when whoever started it is gone, by kill -9 too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@contextmanager
def _stoppable(running: Mapping[subprocess.Popen[bytes], Job]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP reach the runs, which save; then this process leaves, too."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise RunError(f"stopped by {signal.Signals(signum).name}; the runs under way are saved. Start again to go on.")

    before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not ignored(s)}
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _settings(recipe: Path, common: Mapping[str, Any], task: Any, methods: Mapping[str, Any], cell: Cell) -> Config:
    """Settings of a cell, in layers: the task's recipe, [settings], [tasks.NAME], the method, [methods.NAME], rate and seed."""
    if not isinstance(task, Mapping):
        raise ConfigError(f"{recipe}: [tasks.{cell.task}] must be a table.")
    task, own = dict(task), dict(methods.get(cell.method) or {})
    source, method = task.pop("recipe", None), own.pop("base", cell.method)
    values: dict[str, Any] = {} if source is None else _read_toml(recipe.parent / str(source))
    for layer in (common, task):
        _merge(values, layer)
    overrides: dict[str, Any] = {}
    if method in UNTRAINED:
        overrides = dict(UNTRAINED[method][1])
    elif method in ALGORITHMS:
        values["algorithm"] = {**values.get("algorithm", {}), "name": method}
        for name in CRITIC_ONLY if "critic" not in ALGORITHMS[method].algorithm else ():
            room, _, key = name.partition(".")
            values.get(room, {}).pop(key, None)
        overrides = {"env.agents": 1, "rollout.protocol": "single"} if method in ALONE else {}
    else:
        known = ", ".join([*UNTRAINED, *ALGORITHMS])
        raise ConfigError(
            f"{recipe}: there is no method {method!r}. Known: {known}; your own is [methods.NAME] with base = one of them."
        )
    apply_overrides(values, overrides)
    tasks = values.get("rollout", {}).get("tasks")
    _merge(values, own)
    fixed = {"run.seed": cell.seed, "run.folder": str(cell.folder.parent), "run.name": cell.folder.name}
    if cell.rate is not None:
        fixed |= {"learner.lr": cell.rate, "critic.lr": cell.rate}
    apply_overrides(values, fixed)
    config = parse_config(values)
    if method in ALGORITHMS and not config.evaluation.every:
        raise ConfigError(
            f"{recipe}: evaluation.every=0 leaves nothing to compare ({cell.method} on {cell.task}). Set it above 0."
        )
    size = config.algorithm.group_size
    if method in ALGORITHMS and size > 1 and config.rollout.tasks == (tasks or config.rollout.tasks):
        if config.rollout.tasks % size:
            raise ConfigError(
                f"{recipe}: rollout.tasks={config.rollout.tasks} episodes an iteration are no whole number of groups of {size} "
                f"({cell.method} on {cell.task}). Choose a multiple, or set rollout.tasks in [methods.{cell.method}]."
            )
        apply_overrides(values, {"rollout.tasks": config.rollout.tasks // size})
        config = parse_config(values)
    return config


def _merge(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Put nested settings on top of others, table by table."""
    for key, value in layer.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            _merge(values[key], value)
        else:
            values[key] = copy.deepcopy(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid TOML: {error}.") from error


def _name(method: str, rate: float | None, seed: int) -> str:
    return f"{method}-seed{seed}" if rate is None else f"{method}-lr{rate:g}-seed{seed}"
