"""Standard output and error that can fail: the terminal is closed, a pipe has no reader, a device is full."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO

from collm.types import printable


def forgo(stream: TextIO) -> None:
    """Redirect a standard stream to the null device, so that later writes and the flush at exit cannot fail."""
    with suppress(OSError, ValueError):  # ValueError: the stream is not a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Lasting:
    """A stream whose writes never fail; after the first failure it discards text.

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
    """Print a message on standard error, if it is still open. Control characters in the text are escaped."""
    print(printable(text), file=Lasting(sys.stderr), flush=True)
