"""Processes that end with the one that began them."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Running(Protocol):
    """A process, here (`subprocess.Popen`) or elsewhere."""

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        ...

    def terminate(self) -> None:
        """Send it SIGTERM."""
        ...

    def wait(self) -> int:
        """Wait for its end."""
        ...


def begin_module(
    words: Sequence[str], log: Path, *, folder: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Begin `python -m WORDS` in a session of its own, and append its output to a file."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_die_with_parent,
            cwd=folder,
            env=environment,
        )


def _die_with_parent() -> None:
    """On Linux a process gets SIGTERM when its parent ends, even by kill -9; a run saves then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
