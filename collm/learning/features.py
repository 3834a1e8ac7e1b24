"""Features of regressions: the rewards so far, and numbers from what a critic may see."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from collm.errors import TrainingError
from collm.learning.batch import Batch
from collm.learning.readings import Columns, Reader, joined
from collm.types import Counterfactual, Episode


@dataclass(frozen=True, slots=True)
class Point:
    """What was known at one point of an episode: before a turn, or after the last one."""

    so_far: float
    """Sum of the rewards so far, shift included."""
    last: float
    """Raw reward of the turn before; 0 before the first turn."""
    metrics: Mapping[str, Any]
    """Environment metrics."""
    first: Mapping[str, str]
    """Agent -> its first observation."""
    newest: Mapping[str, str]
    """Agent -> its newest observation."""

    def after(self, outcome: Counterfactual) -> Point:
        """The point after a counterfactual turn that was played from here."""
        return replace(
            self,
            so_far=self.so_far + outcome.reward,
            last=outcome.raw_reward,
            metrics=outcome.metrics,
            newest={**self.newest, **outcome.observations},
        )


class Source(Protocol):
    """Where the numbers of a regression come from, beside the rewards so far."""

    @property
    def width(self) -> int:
        """Number of columns."""
        ...

    def collect(self, points: Sequence[Point]) -> None:
        """Get to know an iteration's points before any of them is read: columns may follow from them."""
        ...

    def numbers(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """(S, width) numbers at S points; NaN for a metric that is not a number. Raises TrainingError for a reading that is not
        finite."""
        ...


class MetricSource:
    """The named environment metrics; without names, the rewards so far are the only features."""

    def __init__(self, names: Sequence[str]):
        self.names = tuple(names)

    @property
    def width(self) -> int:
        return len(self.names)

    def collect(self, points: Sequence[Point]) -> None:
        pass

    def numbers(self, points: Sequence[Point]) -> NDArray[np.float64]:
        """(S, width); 0 for a metric that is not reported."""
        found = [[_number(point.metrics.get(name, 0.0)) for name in self.names] for point in points]
        return np.array(found, dtype=np.float64).reshape(len(points), self.width)


class TextSource:
    """Readings of the first and the newest observation of some agents, and of no other text.

    Rewards so far are among the features all the same: the joint reward is common knowledge of the team.

    Args: agents: those whose observations are read; None for all, frozen team-mates included.
    """

    def __init__(self, read: Reader, agents: Sequence[str] | None = None):
        self.read = functools.lru_cache(maxsize=None)(read)
        self.agents = None if agents is None else tuple(agents)
        self.columns = Columns()

    @property
    def width(self) -> int:
        return self.columns.width

    def collect(self, points: Sequence[Point]) -> None:
        self.read.cache_clear()  # it holds the texts of one iteration
        self.columns.add([self._of(point) for point in points])

    def numbers(self, points: Sequence[Point]) -> NDArray[np.float64]:
        return self.columns([self._of(point) for point in points]).double().numpy()

    def _of(self, point: Point) -> dict[str, float]:
        agents = sorted(point.newest) if self.agents is None else self.agents
        return self.read(*(joined(seen.get(agent, "") for agent in agents) for seen in (point.first, point.newest)))


def points_of(episode: Episode) -> list[Point]:
    """The points before each turn and after the last one, T + 1 in all."""
    so_far = last = 0.0
    first: dict[str, str] = {}
    newest: dict[str, str] = {}
    found = []
    for turn in episode.turns:
        first, newest = {**turn.observations, **first}, {**newest, **turn.observations}
        found.append(Point(so_far, last, turn.metrics, first, newest))
        so_far, last = so_far + turn.reward, turn.raw_reward
    return [*found, Point(so_far, last, episode.metrics, first, {**newest, **episode.observations})]


def features(batch: Batch, source: Source) -> Tensor:
    """Features (E, T + 1, M) before each turn and after the last one: sum of rewards so far, last raw reward, the source's
    numbers. Raises TrainingError for a number that is not finite."""
    E, _, T = batch.shape
    rows_ETM = np.zeros((E, T + 1, 2 + source.width))
    for e, episode in enumerate(batch.episodes):
        points = points_of(episode)
        rows_ETM[e, : len(points)] = _rows(source, points)
        if isinstance(source, MetricSource):
            _check(source, episode, e, points, rows_ETM[e, :, 2:])
    return torch.from_numpy(rows_ETM).float()


def counterfactual_features(
    batch: Batch, source: Source, outcomes: Mapping[tuple[int, int], Counterfactual]
) -> tuple[Tensor, Tensor]:
    """Features (E, T, M) after each turn as it would be without one agent's answer; and (E, T) bool where they are known and
    finite. outcomes: (episode, turn) -> the outcome of the turn without that answer."""
    E, _, T = batch.shape
    rows_ETM, known_ET = np.zeros((E, T, 2 + source.width)), np.zeros((E, T), dtype=bool)
    for e, episode in enumerate(batch.episodes):
        turns = [t for t in range(episode.own_from, len(episode.turns)) if (e, t) in outcomes]
        points = points_of(episode) if turns else []
        found = _rows(source, [points[t].after(outcomes[e, t]) for t in turns])
        for t, row in zip(turns, found, strict=True):
            if np.isfinite(row).all():
                rows_ETM[e, t], known_ET[e, t] = row, True
    return torch.from_numpy(rows_ETM).float(), torch.from_numpy(known_ET)


def _check(source: MetricSource, episode: Episode, e: int, points: Sequence[Point], numbers_TM: NDArray[np.float64]) -> None:
    """Raises TrainingError for a metric that is not finite; after the end of an episode nothing is read."""
    read = len(points) if episode.truncated else len(points) - 1
    for t, column in np.argwhere(~np.isfinite(numbers_TM[:read])).tolist():
        name = source.names[column]
        raise TrainingError(
            f"the environment metric {name!r} is {points[t].metrics[name]!r} before turn {t} of episode {e} (task "
            f"{episode.label}), not a finite number. Nothing was learned from this iteration. `collm check` names what an "
            "environment may report."
        )


def _rows(source: Source, points: Sequence[Point]) -> NDArray[np.float64]:
    rewards = np.array([[point.so_far, point.last] for point in points], dtype=np.float64).reshape(len(points), 2)
    return np.concatenate([rewards, source.numbers(points)], 1)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
