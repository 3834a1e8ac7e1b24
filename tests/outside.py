"""What someone may write outside the package: a baseline, an engine, and hands that call parts in their own threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from collm.engines.local import LocalEngine
from collm.learning.parts import Part
from collm.models.team import Team
from collm.types import Completion, Request


def median(returns_G: Tensor) -> Tensor:
    """The median of the siblings' returns."""
    return returns_G.quantile(0.5, dim=0, keepdim=True).expand_as(returns_G)


def length(first: str, newest: str) -> dict[str, float]:
    """Numbers read from texts."""
    return {"length": float(len(newest))}


def shapeless(returns_G: Tensor) -> Tensor:
    return returns_G.mean()


def unmarked(returns_G):
    return returns_G


class LoggingEngine:
    """The four methods of an engine, around the local one; the calls are counted. stale: new weights are not taken."""

    trains = True

    def __init__(self, team: Team, *, stale: bool = False):
        self.engine, self.stale = LocalEngine(team), stale
        self.calls: dict[str, int] = dict.fromkeys(("generate", "load", "rest", "close"), 0)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.calls["generate"] += 1
        return self.engine.generate(requests)

    def load(self, team: Team) -> None:
        self.calls["load"] += 1
        if not self.stale:
            self.engine.load(team)

    def rest(self) -> None:
        self.calls["rest"] += 1
        self.engine.rest()

    def close(self) -> None:
        self.calls["close"] += 1
        self.engine.close()


class ThreadHands:
    """Calls every part in a thread of its own, at once."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)

    def all(self, method: str, *arguments: Any) -> list[Any]:
        def call(part: Part) -> Any:
            torch.set_num_threads(1)
            return getattr(part, method)(*arguments)

        with ThreadPoolExecutor(len(self.parts)) as pool:
            return list(pool.map(call, self.parts))
