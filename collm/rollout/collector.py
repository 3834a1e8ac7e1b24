"""The interface between the trainer and the code that plays episodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

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
        iteration: the iteration whose weights answer.
        """
        ...


class LocalCollector:
    """Plays in this process, with one engine."""

    def __init__(self, engine: Engine, *, stop: Stop = lambda: None):
        self.engine, self.stop = engine, stop

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int = 0) -> list[Group]:
        groups = collect(plan, self.engine, tasks, keys, stop=self.stop)
        episodes = [episode for group in groups for episode in group.episodes]
        if plan.resamples:
            resample(plan, self.engine, episodes, stop=self.stop)
        if plan.no_op:
            replay_without(plan, episodes, stop=self.stop)
        return groups
