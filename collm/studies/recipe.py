"""A study's recipe: its runs and the settings of each."""

from __future__ import annotations

import copy
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from collm.errors import ConfigError
from collm.settings.checks import CRITIC_ONLY, is_address
from collm.settings.load import apply_overrides, parse_config
from collm.settings.presets import ALGORITHMS, CRITIC_BASELINES
from collm.settings.rooms import OFF, Config
from collm.studies.jobs import StudyJob, digest
from collm.studies.result import Cell

UNTRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "raw": ("one untrained agent alone", {"env.agents": 1}),
    "parallel": ("untrained agents, all at the same time", {"rollout.protocol": "parallel"}),
    "pipeline": ("untrained agents, each reading the answers of those before it", {"rollout.protocol": "pipeline"}),
    "discussion": ("untrained agents after a round of messages", {"rollout.protocol": "discussion"}),
}
ALONE = ("ac", "grpo")
"""Algorithms that train a single agent; they set env.agents to 1."""
FIXED = {
    "run.seed": "Set compare.seeds.",
    "run.name": "A run is named after its method, learning rate and seed.",
    "run.folder": "Choose the comparison's folder.",
    "algorithm.name": "Set compare.methods.",
}
"""Setting that differs between the runs of a comparison -> what to set instead."""


class StudySettings(BaseModel):
    """The table [compare] of a recipe."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)
    methods: list[str] = Field(min_length=1)
    """Algorithms, raw, parallel, pipeline, discussion, or names of [methods.NAME]."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Seeds; every method trains once with each."""
    learning_rates: list[float] = []
    """Learning rates, for agents and critics, with which every trained method runs; default: those of the task's recipe."""
    processes: int = Field(1, ge=1)
    """Number of runs at the same time."""
    cluster: Annotated[str | None, OFF] = None
    """Ray cluster on whose nodes runs are placed: "local", "auto" or HOST:PORT; "none": processes of this machine."""
    against: str | None = None
    """The method that the others are compared with, seed by seed; default: the last of `methods`."""
    thresholds: dict[str, float] = {}
    """Task -> held-out reward; the table shows after how many joint actions a method reaches it."""
    fidelity: int = Field(0, ge=0)
    """Number of answers whose credit is compared with counterfactual truth, once per trained run at half of its training; each
    costs 32 plays to the end. 0: none."""


def read_plan(recipe: Path, folder: Path, overrides: Mapping[str, Any] | None = None) -> tuple[StudySettings, list[StudyJob]]:
    """The recipe's table [compare] and all its runs. Raises ConfigError before anything is started.

    overrides: `{"room.key": value}`, applied after the settings of the tasks and before those of [methods.NAME]; "compare.KEY"
    replaces a value of the table [compare].
    """
    values = _read_toml(recipe)
    changes = dict(overrides or {})
    for name, way_out in FIXED.items():
        if name in changes:
            raise ConfigError(f"{name} differs from run to run of a comparison, so it cannot be overridden. {way_out}")
    unknown = sorted(values.keys() - {"compare", "settings", "tasks", "methods"})
    if unknown:
        raise ConfigError(
            f"{recipe}: unknown table [{unknown[0]}]; there are [compare], [settings], [tasks.NAME], [methods.NAME]."
        )
    if not isinstance(values.get("compare"), dict):
        raise ConfigError(f"{recipe} has no table [compare]: list the methods and seeds to run there.")
    about = {name: changes.pop(name) for name in [*changes] if name.startswith("compare.")}
    apply_overrides(values, about)
    try:
        plan = StudySettings.model_validate(values["compare"])
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{recipe}: compare.{name}: {first['msg'][0].lower()}{first['msg'][1:]}.") from error
    try:
        is_address(plan.cluster, "compare.cluster")
    except ValueError as error:
        raise ConfigError(f"{recipe}: {error}") from error
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
            config = _settings(recipe, values.get("settings") or {}, tasks[task], methods, cell, changes)
            if plan.cluster is not None and config.cluster.address is not None:
                raise ConfigError(
                    f"{recipe}: compare.cluster places whole runs on nodes, and cluster.address the models of one run "
                    f"({task}). Leave one of them out."
                )
            jobs.append(StudyJob(replace(cell, settings=digest(config.resolved(), trained)), config, trained, plan.fidelity))
    return plan, jobs


def _settings(
    recipe: Path,
    common: Mapping[str, Any],
    task: Any,
    methods: Mapping[str, Any],
    cell: Cell,
    changes: Mapping[str, Any],
) -> Config:
    """The settings of a cell, applied in this order: the task's recipe, [settings], [tasks.NAME], `changes`, the method,
    [methods.NAME], learning rate and seed."""
    if not isinstance(task, Mapping):
        raise ConfigError(f"{recipe}: [tasks.{cell.task}] must be a table.")
    task, own = dict(task), dict(methods.get(cell.method) or {})
    source, method = task.pop("recipe", None), own.pop("base", cell.method)
    values: dict[str, Any] = {} if source is None else _read_toml(recipe.parent / str(source))
    for layer in (common, task):
        _merge(values, layer)
    apply_overrides(values, changes)
    overrides: dict[str, Any] = {}
    if method in UNTRAINED:
        overrides = dict(UNTRAINED[method][1])
    elif method in ALGORITHMS:
        values["algorithm"] = {**values.get("algorithm", {}), "name": method}
        for name in CRITIC_ONLY if ALGORITHMS[method].algorithm["baseline"] not in CRITIC_BASELINES else ():
            room, _, key = name.partition(".")
            values.get(room, {}).pop(key, None)
        overrides = {"env.agents": 1} if method in ALONE else {}
    else:
        known = ", ".join([*UNTRAINED, *ALGORITHMS])
        raise ConfigError(
            f"{recipe}: unknown method {method!r}. Known: {known}; define your own as [methods.NAME] with base = one of them."
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
                f"{recipe}: rollout.tasks={config.rollout.tasks} episodes is not a multiple of the group size {size} "
                f"({cell.method} on {cell.task}). Choose a multiple, or set rollout.tasks in [methods.{cell.method}]."
            )
        apply_overrides(values, {"rollout.tasks": config.rollout.tasks // size})
        config = parse_config(values)
    return config


def _merge(values: dict[str, Any], layer: Mapping[str, Any]) -> None:
    """Merge nested settings into `values`, table by table; `layer` takes precedence."""
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
