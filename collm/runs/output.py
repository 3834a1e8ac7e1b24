"""Standard output and error, which may go away: a terminal is closed, a pipe has no reader, a device is full."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from collm.types import printable


def forgo(stream: TextIO) -> None:
    """Writes nothing more to where a standard stream led: neither now nor when the process ends."""
    with suppress(OSError, ValueError):  # ValueError: a stream that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Lasting:
    """A stream that takes text whether or not anybody can still read it.

    Example: print("half done", file=Lasting(sys.stderr))
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            forgo(self._stream)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            forgo(self._stream)


def complain(text: str) -> None:
    """A message on standard error, if that is still there; text of others in it cannot steer the terminal."""
    print(printable(text), file=Lasting(sys.stderr), flush=True)
