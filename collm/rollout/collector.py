"""The interface between the trainer and the code that plays episodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from collm.engines.base import Engine
from collm.rollout.collect import collect
from collm.rollout.live import Stop
from collm.rollout.plan import Plan
from collm.rollout.replay import replay_without, resample
from collm.types import Group


class Collector(Protocol):
    """Plays a plan."""

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int) -> list[Group]:
        """Play one group per task; its random numbers follow from its key alone.

        The returned episodes are complete, with the resampled answers and no-op replays of the plan, and are not changed later.
        iteration: the iteration that learns from the episodes, counted from 0. The present weights answer.
        """
        ...


@runtime_checkable
class Background(Collector, Protocol):
    """A collector that plays in other processes, while this one goes on."""

    def begin(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int) -> Callable[[], list[Group]]:
        """As `play`, with the present weights; returns a function that waits for the groups."""
        ...


def begin_play(
    collector: Collector, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int
) -> Callable[[], list[Group]]:
    """Begin to play with the present weights; returns a function that waits for the groups. A collector that plays in this
    process has played them by then."""
    if isinstance(collector, Background):
        return collector.begin(plan, tasks, keys, iteration)
    groups = collector.play(plan, tasks, keys, iteration)
    return lambda: groups


def cut(number: int, shards: int) -> list[slice]:
    """Cut `number` items into so many contiguous pieces, whose sizes differ by at most 1; into fewer if there are fewer items.

    Example: cut(5, 2) -> [slice(0, 2), slice(2, 5)]
    """
    shards = max(1, min(shards, number))
    return [slice(number * i // shards, number * (i + 1) // shards) for i in range(shards)]


class LocalCollector:
    """Plays in this process, with one engine.

    shards: number of pieces that tasks are cut into. Between two pieces the engine rests, so that it has no cache of the former
    one and each piece is played as if it were alone.
    """

    def __init__(self, engine: Engine, *, shards: int = 1, stop: Stop = lambda: None):
        self.engine, self.shards, self.stop = engine, shards, stop

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int = 0) -> list[Group]:
        groups: list[Group] = []
        for piece in cut(len(tasks), self.shards):
            if groups:
                self.engine.rest()
            groups += self._play(plan, tasks[piece], keys[piece])
        return groups

    def _play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int]) -> list[Group]:
        groups = collect(plan, self.engine, tasks, keys, stop=self.stop)
        episodes = [episode for group in groups for episode in group.episodes]
        if plan.resamples:
            resample(plan, self.engine, episodes, stop=self.stop)
        if plan.no_op:
            replay_without(plan, episodes, stop=self.stop)
        return groups
