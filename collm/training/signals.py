"""Ctrl-C, SIGTERM and SIGHUP: a run leaves at the next safe point, with everything done so far saved."""

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
    """Notes the first signal for `check`; a second one raises KeyboardInterrupt at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handle signals while the context is open; outside the main thread they are left to whoever runs us."""

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
