"""The interface between the trainer and text generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from collm.types import Completion, Request

if TYPE_CHECKING:  # remote agents are played without torch
    from collm.models.team import Team


class Engine(Protocol):
    """Answers requests."""

    trains: bool
    """Whether completions have token ids and log-probs. Training refuses an engine without them."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Returns one completion per request, in order. A request that cannot be answered has finish_reason "error" and its
        reason. Raises EngineError if the engine as a whole has failed."""
        ...

    def load(self, team: Team) -> None:
        """Load the team's present weights; later answers use no older ones."""
        ...

    def rest(self) -> None:
        """Release memory for the learner until the engine is used again."""
        ...

    def close(self) -> None:
        """Release all memory, connections and processes. The engine is not used again."""
        ...
