"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: a run stops at the next safe point and saves everything done so far."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from collm.runs.directory import ignored


class Interrupted(Exception):
    """A signal asked the run to stop; everything done so far is saved."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """Records the first signal for `check`; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals in this context; outside the main thread, signal handlers are not changed."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = signum

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not ignored(s)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
