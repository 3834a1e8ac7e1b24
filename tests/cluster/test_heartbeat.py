"""A call that takes longer than iterations do is named once, with its seat."""

from __future__ import annotations

import threading
import time

import pytest

from collm.cluster.heartbeat import FEWEST, TIMES, Asked, Heartbeat


def late(seconds: list[float], waiting: dict[str, Asked]) -> tuple[Heartbeat, list[str], threading.Event]:
    """A heartbeat after iterations of so many seconds, what it says, and an event that follows."""
    said, event = list[str](), threading.Event()
    heartbeat = Heartbeat(lambda: waiting, lambda line: (said.append(line), event.set()))
    heartbeat.seconds = seconds
    return heartbeat, said, event


def test_a_call_of_three_medians_is_late() -> None:
    begun = time.monotonic()
    heartbeat, said, event = late([0.1, 0.1, 60.0], {"critic": ("update", begun), "a": ("generate", begun)})
    heartbeat.beat()
    assert event.wait(30)
    assert time.monotonic() - begun >= TIMES * 0.1  # not three means
    assert said == [
        "collm: no answer for more than 3 times as long as an iteration usually takes (0.1 s, a median) from critic (update), "
        "a (generate)."
    ]
    heartbeat.stop()


def test_a_long_iteration_of_short_calls_is_not_named() -> None:
    heartbeat, said, _ = late([0.01] * 3, {})
    heartbeat.beat()
    looks = {id(heartbeat.timer)}
    end = time.monotonic() + 30
    while len(looks) < 4 and time.monotonic() < end:  # a long evaluation: nothing pending, then a call that is young
        now = {"a": ("generate", time.monotonic())} if len(looks) == 2 else {}
        heartbeat.waiting = lambda now=now: now
        looks.add(id(heartbeat.timer))
    heartbeat.stop()
    assert len(looks) == 4
    assert said == []


def test_the_time_is_measured_from_the_call() -> None:
    heartbeat, said, _ = late([20.0] * 3, {"a": ("generate", time.monotonic() - 50)})
    heartbeat.timer = threading.current_thread()  # type: ignore[assignment]
    heartbeat._look(20.0)
    assert said == []
    assert heartbeat.timer is not None
    assert heartbeat.timer.interval == pytest.approx(10, abs=1)
    heartbeat.stop()
    assert heartbeat.timer is None


def test_each_iteration_begins_anew() -> None:
    heartbeat, said, _ = late([20.0] * 9, {})
    timers = []
    for _ in range(3):
        heartbeat.beat()
        timers.append(heartbeat.timer)
    assert all(timer is not None and timer.interval == pytest.approx(TIMES * 20.0) for timer in timers)
    assert [timer.finished.is_set() for timer in timers if timer is not None] == [True, True, False]
    assert len(heartbeat.seconds) == 11
    heartbeat.stop()
    assert said == []


def test_the_first_iterations_have_no_median() -> None:
    heartbeat, _, _ = late([0.001] * (FEWEST - 2), {})
    heartbeat.beat()
    heartbeat.beat()
    assert heartbeat.timer is None
