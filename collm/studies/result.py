"""The results of one run of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from annotated_types import Len
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from collm.errors import RunError
from collm.runs.fidelity import read_evidence
from collm.runs.open import Run, open_run
from collm.runs.read import read_episodes, read_evaluation
from collm.studies.fidelity import agreement
from collm.studies.series import (
    Curves,
    ceiling_by_turn,
    explained_by_turn,
    held_out_curve,
    repeats_tasks,
    scores,
    spread_by_turn,
)

RESULTS = "results.json"
"""Name of the file in a study's folder that holds the results of all finished runs."""
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
    ceiling: dict[str, float]
    fidelity: NotRequired[dict[str, Any]]


_WRITTEN: TypeAdapter[Any] = TypeAdapter(_Written)


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study: a method with one learning rate and one seed on one task.

    Example: Cell("two", "magrpo", rate=1e-3, seed=0, folder=Path("runs/compare-small/two/magrpo-lr0.001-seed0"))
    """

    task: str
    method: str
    rate: float | None
    """Learning rate of agents and critics; None: those of the task's recipe."""
    seed: int
    folder: Path
    """The run directory."""
    settings: str = ""
    """A digest of the settings that affect results."""

    @property
    def name(self) -> tuple[str, str, float | None, int]:
        return self.task, self.method, self.rate, self.seed

    @property
    def finished(self) -> bool:
        return (self.folder / "final").is_dir()


@dataclass(frozen=True, slots=True)
class Result:
    """The results of one finished run; each held-out task counts once."""

    cell: Cell
    joint_actions_K: tuple[int, ...]
    """(K,) joint actions done at each held-out evaluation."""
    rewards_K: tuple[float, ...]
    """(K,) mean reward of each held-out evaluation."""
    final: Mapping[str, float]
    """Measure -> mean after training; "reward" first."""
    tokens: float
    """Tokens sampled per held-out episode."""
    joint_actions: int
    """Joint actions of training."""
    seconds: float
    """Seconds of training, without evaluations."""
    failed: int
    """Held-out episodes that were not played to their end, over all evaluations; means leave them out."""
    judged: str
    """The variance that `explained` is a fraction of, and whether the critics had read the turn's answers."""
    explained: Mapping[int, float]
    """Turn -> fraction of the return's variance that the critics explain before it, over the second half of training; empty
    without a critic."""
    ceiling: Mapping[int, float]
    """Turn -> the metric ceiling: the share that a regression on environment metrics explains."""
    fidelity: Mapping[str, Any] | None = None
    """`Fidelity.plain()` of the run at half of its training, if the recipe has `compare.fidelity`."""

    @property
    def area(self) -> float:
        return area_under(self.joint_actions_K, self.rewards_K)

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
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
            "ceiling": {str(turn): share for turn, share in self.ceiling.items()},
            **({} if self.fidelity is None else {"fidelity": dict(self.fidelity)}),
        }

    @classmethod
    def from_plain(cls, cell: Cell, plain: Mapping[str, Any]) -> Result:
        """The exact inverse of `plain`. Raises ValueError where `plain` has another structure."""
        if "ceiling" not in plain and "yardstick" in plain:  # its former name
            plain = {**plain, "ceiling": plain["yardstick"]}
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
            {int(turn): share for turn, share in plain["ceiling"].items()},
            plain.get("fidelity"),
        )


def read_result(cell: Cell) -> Result:
    """The results of one run. Raises RunError where it has no held-out evaluation."""
    run = open_run(cell.folder)
    evaluations = run.evaluations()
    if not evaluations:
        raise RunError(f"{str(cell.folder)!r} has no held-out evaluation to compare. Set evaluation.every above 0.")
    at, rewards = held_out_curve(run)
    episodes = read_evaluation(evaluations[max(evaluations)])
    failed = sum(len(read_episodes(path)) - len(read_evaluation(path)) for path in evaluations.values())
    final = {name: float(np.mean(list(tasks.values()))) for name, tasks in scores(episodes).items()}
    tokens = float(np.mean([episode.get("tokens", 0) for episode in episodes]))
    cost, spread, evidence = run.cost(), spread_by_turn(run), read_evidence(cell.folder)
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
        _second_half(ceiling_by_turn(run), spread, cost["joint_actions"]),
        None if evidence is None else agreement(evidence).plain(),
    )


def _judged(run: Run) -> str:
    variance = "within tasks" if repeats_tasks(run) else "tasks included"
    return variance + (", answers read" if run.config["algorithm"].get("critic_kind") == "Q" else "")


def _second_half(curves: Curves, spread: Curves, joint_actions: float) -> dict[int, float]:
    """Turn -> fraction explained over the second half of the joint actions, if it is known in any iteration.

    Iterations are weighted by their variation (`spread`), so that iterations with little variance have little influence.
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
    """Joint actions at which a curve, interpolated linearly, first reaches `threshold`; None if it does not."""
    points = list(zip(joint_actions_K, rewards_K, strict=True))
    if points and points[0][1] >= threshold:
        return float(points[0][0])
    for (x0, y0), (x1, y1) in pairwise(points):
        if y1 >= threshold:
            return float(x0 + (threshold - y0) / (y1 - y0) * (x1 - x0))
    return None
