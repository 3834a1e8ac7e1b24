"""An engine that answers with a function: for tests, scripted team-mates, and replay of recorded answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from collm.types import Completion, Request

if TYPE_CHECKING:
    from collm.models.team import Team


class ScriptedEngine:
    """Answers with `answer(request)`, which returns the text or raises EngineError to fail that request.

    Example: ScriptedEngine(lambda request: "red")
    """

    trains = False

    def __init__(self, answer: Callable[[Request], str]):
        self.answer = answer

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._one(request) for request in requests]

    def load(self, team: Team) -> None:
        return None

    def rest(self) -> None:
        return None

    def close(self) -> None:
        return None

    def _one(self, request: Request) -> Completion:
        from collm.errors import EngineError

        try:
            return Completion(request.agent, self.answer(request))
        except EngineError as error:
            return Completion(request.agent, "", finish_reason="error", error=str(error))
