"""The seam to hardware: what the trainer asks of whatever generates text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

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


@runtime_checkable
class Resting(Protocol):
    """An engine that holds memory which the learner could use meanwhile."""

    def rest(self) -> None:
        """Give that memory back until the next use of the engine."""
        ...
