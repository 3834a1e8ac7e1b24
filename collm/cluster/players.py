"""A rollout worker: copies of all policies and an engine in a process of its own, which play whole shards. Without ray."""

from __future__ import annotations

from collections.abc import Sequence

from safetensors.torch import load, save

from collm.cluster.seats import Seat
from collm.envs.base import EnvMaker
from collm.learning.tensors import restore
from collm.models.split import whole_weights
from collm.rollout.collector import LocalCollector
from collm.rollout.plan import Plan
from collm.runs.heap import HEAP
from collm.types import Group


class Player(Seat):
    """Plays shards. Its methods are called by name through `ask`, one at a time."""

    def weights(self, policy: str, data: bytes) -> None:
        """Load the weights of a policy, which `renew` gives to the engine. Raises ValueError if they do not fit."""
        assert self.held.team is not None
        restore(self.held.team.policies[policy].trained, load(data))

    def policy(self, policy: str) -> bytes:
        """The weights of a policy, as `weights` takes them."""
        assert self.held.team is not None
        return save(whole_weights(self.held.team.policies[policy].trained))

    def renew(self) -> None:
        HEAP.iterated()
        super().renew()

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int) -> list[Group]:
        """Play one shard, as `Collector.play`, with an engine that holds no cache of a former one."""
        assert self.held.engine is not None
        self.held.engine.rest()
        return LocalCollector(self.held.engine).play(plan, tasks, keys, iteration)


def missing(env: EnvMaker, splits: Sequence[str] = ("train",)) -> str:
    """Why an environment cannot be made in this process; empty if it can."""
    try:
        for split in splits:
            env.make(split)
    except Exception as error:
        return str(error) or type(error).__name__
    return ""
