"""SIGINT (Ctrl-C), SIGTERM and SIGHUP: a run stops within one engine call or micro-batch and saves what is complete."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from collm.runs.directory import command, ignored


class Interrupted(BaseException):
    """A signal stopped the run; it continues after its last checkpoint. What handles failures does not handle it."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Signals:
    """Records the first signal; a second one raises KeyboardInterrupt at once.

    Inside `at_once` the first signal raises Interrupted as soon as Python runs again, that is after the present tensor
    operation or backward pass. Elsewhere, for example while files are written, `check` raises it later.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False

    def check(self) -> None:
        """Raises Interrupted after a signal."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal raises Interrupted in this context, and also if it came before."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    @contextmanager
    def listen(self, run: Path | None = None) -> Iterator[None]:
        """Handle signals in this context; outside the main thread, signal handlers are not changed.

        run: the run directory that a line on standard error names at the first signal; None prints nothing.
        """
        resume = "" if run is None else command("collm", "train", "--resume", run)

        def note(signum: int, frame: FrameType | None) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = signum
            if resume:
                name = signal.Signals(signum).name
                with suppress(OSError):  # not through sys.stderr, whose writes the signal may have interrupted
                    os.write(2, f"\ncollm: {name}: stopping after this micro-batch; `{resume}` goes on.\n".encode())
            if self._at_once:
                raise Interrupted(signum)

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not ignored(s)}
        except ValueError:
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
