"""Seats without Ray: a cluster in this process, whose calls and answers are pickled as on their way to another one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from collm.cluster import start
from collm.cluster.places import Device, Place
from collm.cluster.seats import Failed, Seat


def sent(given: Any) -> Any:
    """A copy, as another process gets it."""
    return pickle.loads(pickle.dumps(given))


class PickledSeat:
    """A seat in this process. Its calls run, in order, when the first result is waited for."""

    def __init__(self, name: str):
        self.name, self.seat, self.asked = name, Seat(), list[str]()
        self.waiting: list[Callable[[], None]] = []

    def ask(self, method: str, *arguments: Any) -> Callable[[], Any]:
        self.asked.append(method)
        answers: list[Any] = []
        call = pickle.dumps((method, *arguments))
        self.waiting.append(lambda: answers.append(sent(self.seat.ask(*pickle.loads(call)))))

        def wait() -> Any:
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
        self.seats, self.closed, self.waiting = {}, False, dict[str, str]()

    def devices(self, wanted: str) -> list[Device]:
        return [Device(f"node {number}", "cpu", 64 << 30) for number in range(self.machines)]

    def seat(self, name: str, place: Place) -> PickledSeat:
        self.seats[name] = PickledSeat(name)
        return self.seats[name]

    def share(self, given: Any) -> Any:
        return given

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pickled(monkeypatch: pytest.MonkeyPatch) -> PickledCluster:
    """The cluster that runs with cluster.address="local" get in this test."""
    cluster = PickledCluster()
    monkeypatch.setattr(start.Cluster, "connect", lambda address: cluster)
    return cluster
