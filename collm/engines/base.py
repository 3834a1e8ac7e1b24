"""The seam between the trainer and whatever generates text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from collm.types import Completion, Request

if TYPE_CHECKING:  # remote agents are played without torch
    from collm.models.team import Team


class Engine(Protocol):
    """Answers requests. `trains` says whether completions carry token ids and log-probs; training refuses those that do not."""

    trains: bool

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in order. A request that cannot be answered yields finish_reason "error" with its
        reason; EngineError is for an engine that is gone altogether."""
        ...

    def load(self, team: Team) -> None:
        """Take the team's present weights, so that no stale weight answers."""
        ...

    def rest(self) -> None:
        """Give back memory that the learner could use, until the next use of the engine."""
        ...

    def close(self) -> None:
        """Give everything back: memory, connections, processes. The engine is not used again."""
        ...
