"""A late iteration is named once, with what it waits for."""

from __future__ import annotations

import threading
import time

from collm.cluster.heartbeat import FEWEST, TIMES, Heartbeat


def late(seconds: list[float], waiting: dict[str, str]) -> tuple[Heartbeat, list[str], threading.Event]:
    """A heartbeat after iterations of so many seconds, what it says, and an event that follows."""
    said, event = list[str](), threading.Event()
    heartbeat = Heartbeat(waiting, lambda line: (said.append(line), event.set()))
    heartbeat.seconds = seconds
    return heartbeat, said, event


def test_an_iteration_of_three_medians_is_late():
    begun = time.monotonic()
    heartbeat, said, event = late([0.1, 0.1, 60.0], {"critic": "update", "a": "generate"})
    heartbeat.beat()
    assert event.wait(30)
    assert time.monotonic() - begun >= TIMES * 0.1  # not three means
    assert said == [
        "collm: this iteration takes more than 3 times as long as usual (0.1 s, a median); it waits for critic (update), "
        "a (generate)."
    ]
    heartbeat.stop()


def test_an_iteration_in_time_is_not_named():
    heartbeat, said, _ = late([0.2] * 9, {})
    for _ in range(3):
        heartbeat.beat()
        time.sleep(0.01)
    heartbeat.stop()
    time.sleep(TIMES * 0.2 + 0.1)
    assert said == []
    assert len(heartbeat.seconds) == 11


def test_the_first_iterations_have_no_median():
    heartbeat, said, _ = late([0.001] * (FEWEST - 2), {})
    heartbeat.beat()
    heartbeat.beat()
    time.sleep(0.05)
    assert said == []
    assert heartbeat.timer is None
