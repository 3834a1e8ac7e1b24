"""Seats in processes of their own, without Ray: for units that several processes hold together."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from collm.cluster import start
from collm.cluster.places import Device, Place
from collm.cluster.seats import Failed, Seat
from collm.errors import PartLost

TIME = 120.0
"""Seconds that an answer may take."""


def _serve(pipe: Connection, kind: type[Seat]) -> None:
    seat = kind()
    while True:
        pipe.send(seat.ask(*pipe.recv()))


class ProcessCall:
    """A call that has begun; calls of one seat end in order."""

    def __init__(self, seat: ProcessSeat):
        self.seat = seat

    def __call__(self) -> Any:
        try:
            if not self.seat.pipe.poll(TIME):
                raise AssertionError(f"{self.seat.name} did not answer within {TIME:.0f} s")
            answer = self.seat.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            raise PartLost(f"the process of {self.seat.name} was lost.") from error
        if isinstance(answer, Failed):
            raise answer.error
        return answer


class ProcessSeat:
    """A seat in a process of its own."""

    def __init__(self, name: str, kind: type[Seat]):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, kind), daemon=True)
        self.process.start()
        there.close()

    def ask(self, method: str, *arguments: Any) -> ProcessCall:
        with suppress(BrokenPipeError):  # the call itself says that the process is lost
            self.pipe.send((method, *arguments))
        return ProcessCall(self)


class ProcessCluster:
    """Stands in for `collm.cluster.start.Cluster` on this machine, whose memory is what a test says."""

    def __init__(self) -> None:
        self.memory = 64 << 30
        self.seats: dict[str, ProcessSeat] = {}

    def waiting(self) -> dict[str, Any]:
        return {}

    def devices(self, wanted: str) -> list[Device]:
        return [Device(f"node {number}", "cpu", self.memory) for number in range(6)]

    def seat(self, name: str, place: Place, kind: type[Seat] = Seat) -> ProcessSeat:
        self.seats[name] = ProcessSeat(name, kind)
        return self.seats[name]

    def meeting_point(self, seat: ProcessSeat, place: Place) -> str:
        return f"127.0.0.1:{seat.ask('free_port')()}"

    def first(self, calls: Sequence[ProcessCall]) -> int:
        ready = wait([call.seat.pipe for call in calls], timeout=TIME)
        return next((n for n, call in enumerate(calls) if call.seat.pipe in ready), 0)

    def share(self, given: Any) -> Any:
        return given

    def close(self) -> None:
        for seat in self.seats.values():
            seat.process.kill()
            seat.process.join()


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessCluster]:
    """The cluster that runs with cluster.address="local" get in this test."""
    cluster = ProcessCluster()
    monkeypatch.setattr(start.Cluster, "connect", lambda address: cluster)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    yield cluster
    cluster.close()
