"""Several engines for one team, one per agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from collm.engines.base import Engine
from collm.types import Completion, Request

if TYPE_CHECKING:
    from collm.models.team import Team


class MixedEngine:
    """Agents in `others` are answered by their engine there and all others by `local`; all engines run at the same time.

    It can train if `local` can. New weights are loaded into `local` alone: the others are frozen team-mates.
    Example: MixedEngine(LocalEngine(team), {"helper": HttpEngine({"helper": endpoint("helper", url)})})
    """

    def __init__(self, local: Engine, others: Mapping[str, Engine]):
        self.local, self.others = local, dict(others)
        self.trains = local.trains

    def load(self, team: Team) -> None:
        self.local.load(team)

    def rest(self) -> None:
        self.local.rest()

    def close(self) -> None:
        for engine in {id(engine): engine for engine in (self.local, *self.others.values())}.values():
            engine.close()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        engines = [self.others.get(request.agent, self.local) for request in requests]
        distinct = list({id(engine): engine for engine in engines}.values())
        rows = [[i for i, engine in enumerate(engines) if engine is one] for one in distinct]
        away = [(one, mine) for one, mine in zip(distinct, rows, strict=True) if one is not self.local]
        answers: dict[int, Completion] = {}
        with ThreadPoolExecutor(max(1, len(away)), thread_name_prefix="collm-remote") as pool:
            waiting = [(mine, pool.submit(one.generate, [requests[i] for i in mine])) for one, mine in away]
            mine = [i for i, engine in enumerate(engines) if engine is self.local]
            if mine:  # in this thread, since torch's settings are per thread
                answers.update(zip(mine, self.local.generate([requests[i] for i in mine]), strict=True))
            for mine, future in waiting:
                answers.update(zip(mine, future.result(), strict=True))
        return [answers[i] for i in range(len(requests))]
