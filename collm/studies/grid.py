"""The results of a study: every finished run, and each method's line over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from collm.errors import ConfigError, RunError
from collm.runs.directory import damage, hold
from collm.runs.files import explained, write_text
from collm.studies.intervals import Interval, holm, interval, student, student_p
from collm.studies.result import RESULTS, Cell, Result, first_reaching, read_result
from collm.studies.series import REWARD

SEEDS = 3
"""Smallest number of seeds for an interval over seeds."""


@dataclass(frozen=True, slots=True)
class Study:
    """The runs that are compared: methods x tasks x learning rates x seeds.

    Example: Study([Cell("two", "collm-cc", None, 0, Path("runs/compare-small/two/collm-cc-seed0"))], against="collm-cc")
    """

    cells: Sequence[Cell]
    """Every run, in the recipe's order."""
    against: str
    """The method that the others are compared with, seed by seed."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Task -> held-out reward to reach."""


@dataclass(frozen=True, slots=True)
class Line:
    """All seeds of a method on a task at its best learning rate (by mean area over seeds)."""

    task: str
    method: str
    rate: float | None
    results: Sequence[Result]

    def over_seeds(self, values_S: Sequence[float]) -> Interval:
        return interval(values_S, fewest=SEEDS, unit="seed")

    @property
    def seeds(self) -> list[int]:
        return [result.cell.seed for result in self.results]

    @property
    def reward(self) -> Interval:
        """Held-out reward after training."""
        return self.final[REWARD]

    @property
    def final(self) -> dict[str, Interval]:
        """Measure -> its held-out mean after training; "reward" first."""
        return {name: self.over_seeds([r.final.get(name, math.nan) for r in self.results]) for name in self.results[0].final}

    @property
    def area(self) -> Interval:
        return self.over_seeds([result.area for result in self.results])

    @property
    def explained(self) -> dict[int, Interval]:
        """Turn -> fraction of the return's variance that the critics explain before it."""
        return self._by_turn([result.explained for result in self.results])

    @property
    def ceiling(self) -> dict[int, Interval]:
        """Turn -> metric ceiling: the share that a regression on environment metrics explains before it."""
        return self._by_turn([result.ceiling for result in self.results])

    @property
    def fidelity(self) -> dict[str, Interval]:
        """ "pearson", "spearman" and "ceiling" of the credit at half of the training; empty if a seed was not judged."""
        found = [result.fidelity for result in self.results if result.fidelity is not None]
        if len(found) < len(self.results):
            return {}
        values = {name: [one[name] for one in found] for name in ("pearson", "spearman", "ceiling")}
        numbers = {name: [one["mean"] if isinstance(one, Mapping) else one for one in own] for name, own in values.items()}
        return {name: self.over_seeds([math.nan if x is None else x for x in own]) for name, own in numbers.items()}

    def _by_turn(self, found_S: Sequence[Mapping[int, float]]) -> dict[int, Interval]:
        turns = sorted(set.intersection(*({*found} for found in found_S)))
        return {turn: self.over_seeds([found[turn] for found in found_S]) for turn in turns}

    def reached(self, threshold: float) -> list[float | None]:
        """Joint actions until each seed's curve reached `threshold`; None if it did not."""
        return [first_reaching(r.joint_actions_K, r.rewards_K, threshold) for r in self.results]


@dataclass(frozen=True, slots=True)
class Grid:
    """The finished runs of a study.

    Example: grid.line("two", "collm-cc").reward  # Interval(mean=0.9, low=0.8, high=1.0, num_tasks=3, note="")
    """

    study: Study
    results: Sequence[Result]
    """One result per finished run, in the recipe's order."""
    failure: str = ""
    """How many runs failed in this call, and the reason of the first failure; empty if none failed."""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(result.cell.task for result in self.results))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(result.cell.method for result in self.results))

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(result.cell.seed for result in self.results))

    @property
    def missing(self) -> int:
        """Number of runs that have not finished."""
        return len(self.study.cells) - len(self.results)

    def lines(self, task: str) -> list[Line]:
        """Every method's line of a task, in the recipe's order."""
        found: dict[str, dict[float | None, list[Result]]] = {}
        for result in self.results:
            if result.cell.task == task:
                found.setdefault(result.cell.method, {}).setdefault(result.cell.rate, []).append(result)
        lines = []
        for method, rates in found.items():
            complete = max(map(len, rates.values()))
            full = {rate: results for rate, results in rates.items() if len(results) == complete}
            best = max(full, key=lambda rate: float(np.mean([result.area for result in full[rate]])))
            lines.append(Line(task, method, best, full[best]))
        return lines

    def line(self, task: str, method: str) -> Line:
        """One method's line of a task. Raises ConfigError where no run of it has finished."""
        lines = {line.method: line for line in self.lines(task)}
        if method not in lines:
            have = f"there are {', '.join(lines)}" if lines else f"tasks with finished runs: {', '.join(self.tasks) or 'none'}"
            raise ConfigError(f"no run of {method!r} on {task!r} has finished; {have}.")
        return lines[method]

    def differences(self, task: str) -> dict[str, dict[str, Interval]]:
        """Method -> "area" (with both kinds of interval) and "reward": the mean over seeds of (against minus method)."""
        found = {}
        for method, pairs in self._pairs(task).items():
            areas = [a.area - b.area for a, b in pairs]
            rewards = [a.final[REWARD] - b.final[REWARD] for a, b in pairs]
            found[method] = {
                "area": interval(areas, fewest=SEEDS, unit="seed"),
                "area, Student's t": student(areas, fewest=SEEDS, unit="seed"),
                REWARD: interval(rewards, fewest=SEEDS, unit="seed"),
            }
        return found

    def p_values(self, task: str) -> dict[str, tuple[float, float]]:
        """Method -> Student's p-value of the difference in area, and the same by Holm for all methods of the table.

        NaN below three seeds.
        """
        areas = {method: [a.area - b.area for a, b in pairs] for method, pairs in self._pairs(task).items()}
        single = [student_p(own) if len(own) >= SEEDS else math.nan for own in areas.values()]
        return dict(zip(areas, zip(single, holm(single), strict=True), strict=True))

    def _pairs(self, task: str) -> dict[str, list[tuple[Result, Result]]]:
        """Method -> (run of `against`, its own run) of every seed that both have; no method without `against`."""
        lines = {line.method: line for line in self.lines(task)}
        reference = lines.pop(self.study.against, None)
        own = {} if reference is None else {result.cell.seed: result for result in reference.results}
        pairs = {method: [(own[r.cell.seed], r) for r in line.results if r.cell.seed in own] for method, line in lines.items()}
        return {method: found for method, found in pairs.items() if found}

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON: every run, and for each task every method's line."""
        tasks: dict[str, Any] = {}
        for task in self.tasks:
            methods: dict[str, dict[str, Any]] = {}
            for line in self.lines(task):
                final = line.final
                methods[line.method] = {
                    "learning_rate": line.rate,
                    "seeds": line.seeds,
                    "reward": final.pop(REWARD).plain(),
                    "metrics": {name: found.plain() for name, found in final.items()},
                    "area": line.area.plain(),
                    "joint_actions": float(np.mean([result.joint_actions for result in line.results])),
                    "tokens_per_episode": float(np.mean([result.tokens for result in line.results])),
                    "seconds": float(np.mean([result.seconds for result in line.results])),
                }
                for name, shares in (("explained_variance", line.explained), ("ceiling", line.ceiling)):
                    methods[line.method] |= (
                        {name: {str(turn): found.plain() for turn, found in shares.items()}} if shares else {}
                    )
                if line.fidelity:
                    methods[line.method]["credit_fidelity"] = {name: found.plain() for name, found in line.fidelity.items()}
                if task in self.study.thresholds:
                    methods[line.method]["joint_actions_to_threshold"] = line.reached(self.study.thresholds[task])
            differences: dict[str, dict[str, Any]] = {
                method: {name: found.plain() for name, found in parts.items()}
                for method, parts in self.differences(task).items()
            }
            for method, (single, corrected) in self.p_values(task).items():
                if not math.isnan(single):
                    differences[method] |= {"area, p": single, "area, p by Holm": corrected}
            tasks[task] = {"methods": methods, f"{self.study.against} minus": differences}
            if task in self.study.thresholds:
                tasks[task]["threshold"] = self.study.thresholds[task]
        return {"missing": self.missing, "tasks": tasks, "runs": [result.plain() for result in self.results]}

    def write(self, folder: Path) -> Path:
        """Write `results.json` into a folder. Raises SaveError."""
        write_text(folder / RESULTS, json.dumps(self.plain(), indent=1, allow_nan=False) + "\n")
        return folder / RESULTS


def read_grid(study: Study, written: Path | None = None) -> Grid:
    """The finished runs of a study, from `written` (a results.json) or from their folders.

    Results in `written` are kept even if the run's folder has been removed. Raises RunError where a run is damaged, or where
    `written` holds a run that is not in the recipe, or has other settings and no finished folder.
    """
    known = {} if written is None else _read_written(written)
    cells = {cell.name: cell for cell in study.cells}
    results = {}
    for name, run in known.items():
        cell = cells.get(name)
        if cell is not None and cell.settings == run.get("settings"):
            try:
                results[name] = Result.from_plain(cell, run)
            except (KeyError, TypeError, ValueError) as error:
                raise _unreadable(written, damage(error)) from error
        elif cell is None or not cell.finished:
            why = "is not in the recipe" if cell is None else "was made with other settings than the recipe now has"
            task, method, rate, seed = name
            raise RunError(
                f"{written} has numbers of a run that {why}: {method} on {task}, learning rate {rate}, seed {seed}. "
                f"Choose another --folder, or remove {written} to run it anew."
            )
    for name, cell in cells.items():
        if name not in results and cell.finished:
            results[name] = read_result(cell)
    return Grid(study, [results[name] for name in cells if name in results])


def write_results(study: Study, folder: Path) -> Grid:
    """Write all finished runs to `results.json` and return them. Two processes may work on one folder.

    Raises RunError or SaveError.
    """
    with explained(folder / RESULTS):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{RESULTS}.lock").open("a")
    with lock:
        hold(lock.fileno(), str(folder), wait=True)
        grid = read_grid(study, folder / RESULTS)
        grid.write(folder)
    return grid


def _read_written(path: Path) -> dict[tuple[str, str, float | None, int], dict[str, Any]]:
    if not path.is_file():
        return {}
    try:
        runs = json.loads(path.read_bytes(), parse_constant=_refuse)["runs"]
        return {(run["task"], run["method"], run["learning_rate"], run["seed"]): run for run in runs}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _unreadable(path, repr(error)) from error


def _refuse(text: str) -> Any:
    raise ValueError(f"it holds {text}, which is not a number")


def _unreadable(path: Path | None, error: str) -> RunError:
    return RunError(f"{path} cannot be read as a comparison's results: {error}. Remove it to continue from the run folders.")
