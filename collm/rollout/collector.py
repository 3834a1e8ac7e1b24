"""The seam between the trainer and whatever plays episodes."""

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
        """One group per task; its random numbers follow from its key alone.

        The episodes are complete when they are returned, with the resampled answers and no-op replays that the plan asks for;
        nobody changes them later. `iteration` says which weights answer.
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
