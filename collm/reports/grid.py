"""A comparison of methods over tasks and seeds, from its run directories."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Len
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from collm.errors import RunError
from collm.reports.curves import (
    Curves,
    explained_by_turn,
    held_out_curve,
    repeats_tasks,
    spread_by_turn,
    yardstick_by_turn,
)
from collm.reports.intervals import Interval, interval, student
from collm.reports.tables import REWARD, scores
from collm.runs.directory import damage
from collm.runs.read import Run, read_episodes, read_evaluation, read_run

SEEDS = 3
"""With fewer seeds there is no interval over seeds."""


Curve = Annotated[list[Annotated[list[float], Len(2, 2)]], Len(1)]


class _Written(TypedDict):
    """A run in results.json."""

    curve: Curve
    final: dict[str, float | None]
    tokens_per_episode: float
    joint_actions: int
    seconds: float
    failed_episodes: int
    judged: str
    explained_variance: dict[str, float]
    yardstick: dict[str, float]


_WRITTEN: TypeAdapter[Any] = TypeAdapter(_Written)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a comparison: a method with one learning rate (None: the task's own) and one seed on one task.

    folder: its run directory; settings: a digest of all its settings but where it lies.
    """

    task: str
    method: str
    rate: float | None
    seed: int
    folder: Path
    settings: str = ""

    @property
    def name(self) -> tuple[str, str, float | None, int]:
        return self.task, self.method, self.rate, self.seed


@dataclass(frozen=True, slots=True)
class Grid:
    """What is compared. against: the method the others are held against; thresholds: task -> held-out reward to reach."""

    cells: Sequence[Cell]
    against: str
    thresholds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """One finished run in numbers, over the held-out tasks, each once.

    joint_actions_K, rewards_K: (K,) the held-out curve. final: measure -> mean after training, "reward" first.
    tokens: sampled per held-out episode. joint_actions, seconds: of training. failed: held-out episodes that were not played to
    their end, over all evaluations; they count nowhere. explained, yardstick: turn -> share of the return's variance that the
    critics, and a regression on the world's own numbers, explain before that turn, over all of the second half of training;
    empty without a critic. judged: which variance that is, and whether the critics had read the turn's answers.
    """

    cell: Cell
    joint_actions_K: tuple[int, ...]
    rewards_K: tuple[float, ...]
    final: Mapping[str, float]
    tokens: float
    joint_actions: int
    seconds: float
    failed: int
    judged: str
    explained: Mapping[int, float]
    yardstick: Mapping[int, float]

    @property
    def area(self) -> float:
        return area_under(self.joint_actions_K, self.rewards_K)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        cell = self.cell
        return {
            "task": cell.task,
            "method": cell.method,
            "learning_rate": cell.rate,
            "seed": cell.seed,
            "settings": cell.settings,
            "curve": [list(point) for point in zip(self.joint_actions_K, self.rewards_K, strict=True)],
            "final": {name: value if math.isfinite(value) else None for name, value in self.final.items()},
            "area": self.area,
            "tokens_per_episode": self.tokens,
            "joint_actions": self.joint_actions,
            "seconds": self.seconds,
            "failed_episodes": self.failed,
            "judged": self.judged,
            "explained_variance": {str(turn): share for turn, share in self.explained.items()},
            "yardstick": {str(turn): share for turn, share in self.yardstick.items()},
        }

    @classmethod
    def from_plain(cls, cell: Cell, plain: Mapping[str, Any]) -> Result:
        """The inverse of `plain`, exactly. Raises ValueError where `plain` is of another kind."""
        _WRITTEN.validate_python(plain, strict=True)
        at, rewards = zip(*plain["curve"], strict=True)
        return cls(
            cell,
            at,
            rewards,
            {name: math.nan if value is None else value for name, value in plain["final"].items()},
            plain["tokens_per_episode"],
            plain["joint_actions"],
            plain["seconds"],
            plain["failed_episodes"],
            plain["judged"],
            {int(turn): share for turn, share in plain["explained_variance"].items()},
            {int(turn): share for turn, share in plain["yardstick"].items()},
        )


@dataclass(frozen=True, slots=True)
class Line:
    """A method on a task at its best learning rate (by mean area over seeds), over seeds."""

    task: str
    method: str
    rate: float | None
    results: Sequence[Result]

    def over_seeds(self, values_S: Sequence[float]) -> Interval:
        return interval(values_S, fewest=SEEDS, unit="seed")

    @property
    def final(self) -> dict[str, Interval]:
        return {name: self.over_seeds([r.final.get(name, math.nan) for r in self.results]) for name in self.results[0].final}

    @property
    def area(self) -> Interval:
        return self.over_seeds([result.area for result in self.results])

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Joint actions and held-out reward at every evaluation, the mean over seeds."""
        points = zip(*([*zip(r.joint_actions_K, r.rewards_K, strict=True)] for r in self.results), strict=True)
        means = [np.mean(of_seeds, 0) for of_seeds in points]
        return [float(x) for x, _ in means], [float(y) for _, y in means]

    @property
    def explained(self) -> dict[int, Interval]:
        """Turn -> what the critics explain before it."""
        return self._by_turn([result.explained for result in self.results])

    @property
    def yardstick(self) -> dict[int, Interval]:
        """Turn -> what a regression on the world's own numbers explains before it."""
        return self._by_turn([result.yardstick for result in self.results])

    def _by_turn(self, found_S: Sequence[Mapping[int, float]]) -> dict[int, Interval]:
        turns = sorted(set.intersection(*({*found} for found in found_S)))
        return {turn: self.over_seeds([found[turn] for found in found_S]) for turn in turns}

    def reached(self, threshold: float) -> list[float | None]:
        """Joint actions until each seed's curve reached `threshold`; None where it never did."""
        return [first_reaching(r.joint_actions_K, r.rewards_K, threshold) for r in self.results]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All finished runs of a grid, and how many are still missing."""

    grid: Grid
    results: Sequence[Result]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(result.cell.task for result in self.results))

    @property
    def missing(self) -> int:
        return len(self.grid.cells) - len(self.results)

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

    def differences(self, task: str) -> dict[str, dict[str, Interval]]:
        """Method -> "area" (with both kinds of interval) and "reward": the mean over seeds of (against minus method)."""
        lines = {line.method: line for line in self.lines(task)}
        reference = lines.pop(self.grid.against, None)
        if reference is None:
            return {}
        own = {result.cell.seed: result for result in reference.results}
        found = {}
        for method, line in lines.items():
            pairs = [(own[r.cell.seed], r) for r in line.results if r.cell.seed in own]
            if pairs:
                areas = [a.area - b.area for a, b in pairs]
                found[method] = {
                    "area": line.over_seeds(areas),
                    "area, Student's t": student(areas, fewest=SEEDS, unit="seed"),
                    REWARD: line.over_seeds([a.final[REWARD] - b.final[REWARD] for a, b in pairs]),
                }
        return found

    def overtaken(self, task: str) -> dict[str, float | None]:
        """Trained method that gained anything -> share of its joint actions after which the curve of `against` reaches its
        final reward, both the mean over seeds; None where it never does."""
        lines = {line.method: line for line in self.lines(task)}
        reference = lines.pop(self.grid.against, None)
        found: dict[str, float | None] = {}
        for method, line in lines.items():
            x, y = line.curve
            if reference is not None and x[-1] > 0 and y[-1] > y[0]:
                at = first_reaching(*reference.curve, y[-1])
                found[method] = None if at is None else at / x[-1]
        return found

    def plain(self) -> dict[str, Any]:
        """As JSON has it: every run, and per task each method's line."""
        tasks: dict[str, Any] = {}
        for task in self.tasks:
            methods: dict[str, dict[str, Any]] = {}
            for line in self.lines(task):
                final = line.final
                methods[line.method] = {
                    "learning_rate": line.rate,
                    "seeds": [result.cell.seed for result in line.results],
                    "reward": final.pop(REWARD).plain(),
                    "metrics": {name: found.plain() for name, found in final.items()},
                    "area": line.area.plain(),
                    "joint_actions": float(np.mean([result.joint_actions for result in line.results])),
                    "tokens_per_episode": float(np.mean([result.tokens for result in line.results])),
                    "seconds": float(np.mean([result.seconds for result in line.results])),
                }
                for name, shares in (("explained_variance", line.explained), ("yardstick", line.yardstick)):
                    methods[line.method] |= (
                        {name: {str(turn): found.plain() for turn, found in shares.items()}} if shares else {}
                    )
                if task in self.grid.thresholds:
                    methods[line.method]["joint_actions_to_threshold"] = line.reached(self.grid.thresholds[task])
            differences: dict[str, dict[str, Any]] = {
                method: {name: found.plain() for name, found in parts.items()}
                for method, parts in self.differences(task).items()
            }
            for method, share in self.overtaken(task).items():
                differences.setdefault(method, {})["share_of_its_joint_actions_to_its_final_reward"] = share
            tasks[task] = {"methods": methods, f"{self.grid.against} minus": differences}
            if task in self.grid.thresholds:
                tasks[task]["threshold"] = self.grid.thresholds[task]
        return {"missing": self.missing, "tasks": tasks, "runs": [result.plain() for result in self.results]}


def read_grid(grid: Grid, written: Path | None = None) -> Comparison:
    """The finished runs of a grid, as `written` (a results.json) has them or from their folders.

    What is written stays although its folder is gone. Raises RunError where a run is damaged, or only written and with
    other settings or by a recipe that asked for more.
    """
    known = {} if written is None else _read_written(written)
    cells = {cell.name: cell for cell in grid.cells}
    results = {}
    for name, run in known.items():
        cell = cells.get(name)
        if cell is not None and cell.settings == run.get("settings"):
            try:
                results[name] = Result.from_plain(cell, run)
            except (KeyError, TypeError, ValueError) as error:
                raise _unreadable(written, damage(error)) from error
        elif cell is None or not _finished(cell):
            why = "is not in the recipe" if cell is None else "was made with other settings than the recipe now has"
            task, method, rate, seed = name
            raise RunError(
                f"{written} has numbers of a run that {why}: {method} on {task}, learning rate {rate}, seed {seed}. "
                f"Choose another --folder, or remove {written} to run it anew."
            )
    for name, cell in cells.items():
        if name not in results and _finished(cell):
            results[name] = read_result(cell)
    return Comparison(grid, [results[name] for name in cells if name in results])


def _finished(cell: Cell) -> bool:
    return (cell.folder / "final").is_dir()


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
    return RunError(f"{path} cannot be read as a comparison's results: {error}. Remove it to go on from the run folders.")


def read_result(cell: Cell) -> Result:
    """One run in numbers. Raises RunError where it has no held-out evaluation."""
    run = read_run(cell.folder)
    evaluations = run.evaluations()
    if not evaluations:
        raise RunError(f"{str(cell.folder)!r} has no held-out evaluation to compare. Set evaluation.every above 0.")
    at, rewards = held_out_curve(run)
    episodes = read_evaluation(evaluations[max(evaluations)])
    failed = sum(len(read_episodes(path)) - len(read_evaluation(path)) for path in evaluations.values())
    final = {name: float(np.mean(list(tasks.values()))) for name, tasks in scores(episodes).items()}
    tokens = float(np.mean([episode.get("tokens", 0) for episode in episodes]))
    cost, spread = run.cost(), spread_by_turn(run)
    return Result(
        cell,
        tuple(at),
        tuple(r.mean for r in rewards),
        final,
        tokens,
        cost["joint_actions"],
        cost["seconds"],
        failed,
        _judged(run),
        _second_half(explained_by_turn(run), spread, cost["joint_actions"]),
        _second_half(yardstick_by_turn(run), spread, cost["joint_actions"]),
    )


def _judged(run: Run) -> str:
    variance = "within tasks" if repeats_tasks(run) else "tasks included"
    return variance + (", answers read" if run.config["algorithm"].get("critic_kind") == "Q" else "")


def _second_half(curves: Curves, spread: Curves, joint_actions: float) -> dict[int, float]:
    """Turn -> share explained in the second half of the joint actions together, where that is known in any iteration.

    An iteration counts by how much it had to explain, so that one with next to nothing does not decide.
    """
    found = {}
    for turn, (x, shares) in curves.items():
        weights = spread[turn][1] if turn in spread and np.nansum(spread[turn][1]) > 0 else np.ones(len(shares))
        known = np.isfinite(shares) & (weights > 0) & (x > joint_actions / 2)
        if known.any():
            found[turn] = float(np.average(shares[known], weights=weights[known]))
    return found


def area_under(joint_actions_K: Sequence[float], rewards_K: Sequence[float]) -> float:
    """Mean height of a held-out curve, in units of reward: the area by trapezia over its width.

        sum_k (x_{k+1} - x_k) (y_k + y_{k+1}) / 2 / (x_K - x_1)

    A curve of one point has that point's height.
    """
    x, y = np.asarray(joint_actions_K, dtype=np.float64), np.asarray(rewards_K, dtype=np.float64)
    if len(x) == 1 or x[-1] == x[0]:
        return float(y[-1])
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum() / (x[-1] - x[0]))


def first_reaching(joint_actions_K: Sequence[float], rewards_K: Sequence[float], threshold: float) -> float | None:
    """Joint actions at which a curve, drawn straight from point to point, first has height `threshold`; None: never."""
    points = list(zip(joint_actions_K, rewards_K, strict=True))
    if points and points[0][1] >= threshold:
        return float(points[0][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= threshold:
            return float(x0 + (threshold - y0) / (y1 - y0) * (x1 - x0))
    return None
