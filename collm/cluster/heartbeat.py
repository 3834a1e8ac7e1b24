"""A line when an iteration takes much longer than those before it. Without ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from threading import Timer

from collm.runs.output import complain

TIMES = 3
"""An iteration is late after this many medians of the iterations before it."""
FEWEST = 3
"""Number of iterations before a median counts."""


class Heartbeat:
    """Names what a late iteration waits for, once per iteration.

    Args:
        waiting: seat -> what it was asked for and has not answered; read when an iteration is late.
        say: prints a line.
    """

    def __init__(self, waiting: Mapping[str, str], say: Callable[[str], None] = complain):
        self.waiting, self.say = waiting, say
        self.begun: float | None = None
        self.seconds: list[float] = []
        self.timer: Timer | None = None

    def beat(self) -> None:
        """An iteration begins; the one before it has ended."""
        self.stop()
        now = time.monotonic()
        if self.begun is not None:
            self.seconds.append(now - self.begun)
        self.begun = now
        if len(self.seconds) >= FEWEST:
            usual = median(self.seconds)
            self.timer = Timer(TIMES * usual, self._late, [usual])
            self.timer.daemon = True
            self.timer.start()

    def stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()

    def _late(self, usual: float) -> None:
        asked = ", ".join(f"{seat} ({what})" for seat, what in dict(self.waiting).items()) or "no seat"
        self.say(
            f"collm: this iteration takes more than {TIMES} times as long as usual ({usual:.1f} s, a median); "
            f"it waits for {asked}."
        )
