"""The driver's side of seats: hands, engine and team whose models are in other processes. Without ray.

Every call asks all seats at once and waits for all answers, in the order of the blueprint, so that the result does not depend
on which seat is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import load, save

from collm.cluster.heartbeat import Heartbeat
from collm.learning.tensors import Read, Tensors
from collm.models.blueprint import Blueprint
from collm.types import Completion, Request


class RemoteSeat(Protocol):
    """A `cluster.seats.Seat` in another process."""

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Begin a call. The returned function waits for its result; it raises the seat's error as it was raised there, or
        PartLost."""
        ...


OF_ONE = ("files", "generate", "rest", "renew", "saved", "tensors")
"""Methods of a seat that one of several whole copies carries out."""


class WideSeat:
    """A seat of several processes, the ranks, which are asked together; the answer is that of the first one.

    Args:
        ranks: at least two.
        split: whether the unit's models are split over them, so that all of them take part in every call.
        first: waits until one of these calls has ended, and returns its number.
    """

    def __init__(self, ranks: Sequence[RemoteSeat], *, split: bool, first: Callable[[Sequence[Any]], int]):
        self.ranks, self.split, self.first = ranks, split, first

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        """Begin a call. The first error of any rank is raised, while others may still wait for the rank that failed."""
        head, *others = self.ranks
        calls: list[Any] = [head.ask(method, *arguments)]
        if self.split or method not in OF_ONE:
            calls += [rank.ask("follow", method, *arguments) for rank in others]

        def wait() -> Any:
            left, answer = list(calls), None
            while left:
                call = left.pop(self.first(left))
                found = call()
                answer = found if call is calls[0] else answer
            return answer

        return wait


class SeatHands:
    """Calls the parts of all seats at once.

    Args:
        seats: unit's name -> its seat.
        share: prepares arguments that go to several seats.
    """

    def __init__(self, seats: Mapping[str, RemoteSeat], blueprint: Blueprint, share: Callable[[Any], Any]):
        self.seats, self.share = seats, share
        homes = {
            part.weights_name: (unit.name, place)
            for unit in blueprint.units
            for place, part in enumerate(blueprint.alone(unit).parts)
        }
        self.order = [homes[part.weights_name] for part in blueprint.parts]
        """(unit's name, number in its seat) of each part."""
        self.names = list(dict.fromkeys(name for name, _ in self.order))
        self.readers = [unit.name for unit in blueprint.units if unit.critics]
        """The units whose parts have values; the others need not read the episodes for them."""

    def all(self, method: str, *arguments: Any) -> list[Any]:
        """Call `method` of every part with these arguments; returns the results in the order of the parts."""
        if method == "tensors":
            return [SeatFiles(seat, names) for seat, names in self._files()]
        if method == "restore":
            return self._restore(*arguments)
        asked = self.readers if method == "values" else self.names
        found = self._each(asked, "parts", method, self.share(arguments))
        return [found[name][place] if name in found else None for name, place in self.order]

    def _each(self, names: Sequence[str], method: str, *arguments: Any) -> dict[str, Any]:
        """Call a method of these seats at once: unit's name -> result."""
        calls = {name: self.seats[name].ask(method, *arguments) for name in names}
        return {name: call() for name, call in calls.items()}

    def _files(self) -> list[tuple[RemoteSeat, list[str]]]:
        """The seat of each part, and the names of the part's checkpoint files."""
        files = self._each(self.names, "files")
        return [(self.seats[name], files[name][place]) for name, place in self.order]

    def _restore(self, read: Read) -> list[None]:
        """Restore all parts; one file at a time travels."""
        for seat, names in self._files():
            for name in names:
                seat.ask("receive", name, save(read(name)))()
        self._each(self.names, "restore")
        return [None] * len(self.order)


class SeatFiles(Mapping[str, Tensors]):
    """Checkpoint file of a part -> tensors, which are fetched when they are read."""

    def __init__(self, seat: RemoteSeat, names: Sequence[str]):
        self.seat, self.names = seat, names

    def __getitem__(self, name: str) -> Tensors:
        if name not in self.names:
            raise KeyError(name)
        return load(self.seat.ask("tensors", name)())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class SeatEngine:
    """Each agent's requests go to its seat, and all seats generate at the same time.

    Args:
        homes: agent -> its seat.
        end: ends all seats.
        heartbeat: told at the end of each iteration.
    """

    trains = True

    def __init__(self, homes: Mapping[str, RemoteSeat], end: Callable[[], None], heartbeat: Heartbeat):
        self.homes, self.end, self.heartbeat = homes, end, heartbeat

    @property
    def seats(self) -> list[RemoteSeat]:
        """Each seat once."""
        return list({id(seat): seat for seat in self.homes.values()}.values())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        answers: dict[int, Completion] = {}
        calls = []
        for seat in self.seats:
            rows = [i for i, request in enumerate(requests) if self.homes[request.agent] is seat]
            if rows:
                calls.append((rows, seat.ask("generate", [requests[i] for i in rows])))
        for rows, call in calls:
            answers.update(zip(rows, call(), strict=True))
        return [answers[i] for i in range(len(requests))]

    def load(self, team: Any) -> None:
        self._all("renew")
        self.heartbeat.beat()

    def rest(self) -> None:
        self._all("rest")

    def close(self) -> None:
        self.heartbeat.stop()
        self.end()

    def _all(self, method: str) -> None:
        for call in [seat.ask(method) for seat in self.seats]:
            call()


class SeatTeam:
    """The agents of a team whose policies are in seats.

    Args:
        homes: agent -> its seat, in the team's order.
        vocabulary: number of tokens of the largest vocabulary.
    """

    def __init__(self, homes: Mapping[str, RemoteSeat], vocabulary: int):
        self.homes, self.vocabulary = homes, vocabulary

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(self.homes)

    def save(self, folder: Path) -> None:
        """Write one Hugging Face folder per agent, named after it; one agent's files at a time are in memory."""
        for agent, seat in self.homes.items():
            for name, data in seat.ask("saved", agent)().items():
                path = folder / agent / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
