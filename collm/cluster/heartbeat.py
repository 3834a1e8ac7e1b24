"""A line when a seat does not answer for much longer than an iteration takes. Without ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from threading import Lock, Timer, current_thread

from collm.runs.output import complain

TIMES = 3
"""A call of a seat is late after this many medians of the iterations before."""
FEWEST = 3
"""Number of iterations before a median counts."""

Asked = tuple[str, float]
"""What a seat was asked for, and when, by `time.monotonic`."""


class Heartbeat:
    """Names the seats that do not answer, once per iteration.

    Args:
        waiting: tells in another thread: seat -> what it was asked for and has not answered.
        say: prints a line.
    """

    def __init__(self, waiting: Callable[[], Mapping[str, Asked]], say: Callable[[str], None] = complain):
        self.waiting, self.say = waiting, say
        self.begun: float | None = None
        self.seconds: list[float] = []
        self.timer: Timer | None = None
        self.lock = Lock()

    def beat(self) -> None:
        """An iteration begins; the one before it has ended."""
        self.stop()
        now = time.monotonic()
        if self.begun is not None:
            self.seconds.append(now - self.begun)
        self.begun = now
        if len(self.seconds) >= FEWEST:
            usual = median(self.seconds)
            self._after(TIMES * usual, usual)

    def stop(self) -> None:
        with self.lock:
            if self.timer is not None:
                self.timer.cancel()
            self.timer = None

    def _after(self, seconds: float, usual: float) -> None:
        self.timer = Timer(seconds, self._look, [usual])
        self.timer.daemon = True
        self.timer.start()

    def _look(self, usual: float) -> None:
        """Name the seats if the oldest call is late; otherwise look again when it would be."""
        with self.lock:
            if self.timer is not current_thread():
                return  # stopped
            waiting, now = self.waiting(), time.monotonic()
            age = max((now - since for _, since in waiting.values()), default=0.0)
            if age < TIMES * usual:
                self._after(TIMES * usual - age, usual)
                return
        asked = ", ".join(f"{seat} ({what})" for seat, (what, _) in waiting.items())
        self.say(
            f"collm: no answer for more than {TIMES} times as long as an iteration usually takes ({usual:.1f} s, a median) "
            f"from {asked}."
        )
