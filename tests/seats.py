"""Seats without Ray: a cluster in this process, whose calls and answers are pickled as on their way to another one."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from collm.cluster import start
from collm.cluster.places import Device, Place
from collm.cluster.seats import Failed, Seat
from collm.errors import PartLost


def sent(given: Any) -> Any:
    """A copy, as another process gets it."""
    return pickle.loads(pickle.dumps(given))


class PickledSeat:
    """A seat in this process. Its calls run, in order, when the first result is waited for."""

    def __init__(self, name: str, kind: type[Seat] = Seat, dies: Callable[[str], bool] = lambda method: False):
        self.name, self.seat, self.dies, self.asked = name, kind(), dies, list[str]()
        self.lost = False
        self.waiting: list[Callable[[], None]] = []

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        self.asked.append(method)
        answers: list[Any] = []
        call = pickle.dumps((method, *arguments))
        self.waiting.append(lambda: answers.append(sent(self.seat.ask(*pickle.loads(call)))))

        def wait() -> Any:
            self.lost = self.lost or self.dies(method)
            if self.lost:
                raise PartLost(f"the process of {self.name} was lost during {method!r}.")
            for run in self.waiting:
                run()
            self.waiting.clear()
            (answer,) = answers
            if isinstance(answer, Failed):
                raise answer.error
            return answer

        return wait


class PickledCluster:
    """Stands in for `collm.cluster.start.Cluster`: as many machines as wanted, all of them here."""

    machines = 3
    seats: dict[str, PickledSeat]

    def __init__(self) -> None:
        self.seats, self.closed = {}, False
        self.deaths = set[tuple[str, int]]()
        """(method, number): the seat that is asked for this the n-th time, counted over all seats, dies."""
        self.asked = Counter[str]()
        self.made = list[str]()
        """The name of every seat in the order in which it was made."""
        self.ended = list[PickledSeat]()
        self.pick: Callable[[int], int] = lambda number: 0
        """Which of so many calls ends first."""

    def waiting(self) -> dict[str, Any]:
        return {}

    def devices(self, wanted: str) -> list[Device]:
        return [Device(f"node {number}", "cpu", 64 << 30) for number in range(self.machines)]

    def seat(self, name: str, place: Place, kind: type[Seat] = Seat) -> PickledSeat:
        self.made.append(name)
        self.seats[name] = PickledSeat(name, kind, self._dies)
        return self.seats[name]

    def _dies(self, method: str) -> bool:
        self.asked[method] += 1
        return (method, self.asked[method]) in self.deaths

    def each(self, call: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, Any]]:
        for device in self.devices("cpu"):
            yield device.node, sent(call(*sent(arguments)))

    def first(self, calls: Sequence[Callable[[], Any]]) -> int:
        return self.pick(len(calls))

    def share(self, given: Any) -> Any:
        return given

    def end(self, seat: PickledSeat) -> None:
        self.ended.append(seat)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> PickledCluster:
    """The cluster that runs with cluster.address="local" get in this test."""
    cluster = PickledCluster()
    monkeypatch.setattr(start.Cluster, "connect", lambda address: cluster)
    return cluster
