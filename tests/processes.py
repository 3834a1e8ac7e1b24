"""Processes that tests start: what they print, what runs below them, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path


def below(parent: int) -> dict[int, str]:
    """Number and command line of every process that `parent` began, directly or not."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            above = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ").strip()
            parents[int(path.name)] = above
        except OSError:
            continue  # it has ended
    found: set[int] = {parent}
    while more := {pid for pid, above in parents.items() if above in found} - found:
        found |= more
    return {pid: commands[pid] for pid in found - {parent}}


def running(folder: str) -> list[int]:
    """Processes that name a folder on their command lines."""
    return [pid for pid, command in below(0).items() if folder in command]


def kill_all(begun: subprocess.Popen) -> None:
    """SIGKILL a process and all that it began."""
    for pid in [begun.pid, *below(begun.pid)]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    begun.wait()


def line_of(process: subprocess.Popen[str], seconds: float = 300) -> str:
    """The next line that a process prints; "" at its end. A process that prints none in time is killed with all below it."""
    assert process.stdout is not None
    late = threading.Timer(seconds, kill_all, [process])
    late.start()
    try:
        return process.stdout.readline()
    finally:
        late.cancel()


def until(condition: Callable[[], object], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
