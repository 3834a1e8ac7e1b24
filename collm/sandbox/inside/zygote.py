"""The process inside the box: a warm process (the zygote) that forks two processes for every check.

`box.py` starts it as a script, with only the standard library and numpy. For every check the pool sends three messages. The
zygote reads only the first, which holds a time limit, and forks a child that reads the others:

- the second holds the program. The child forks the *player*, which runs it; neither has read the check at that time.
- the third holds the check. The child becomes the *examiner*, which runs it and calls the program's definitions in the player.

The examiner's answer goes to the zygote through a pipe that the player does not hold. Both install limits and a filter before
they run any code. The zygote never holds a program, a check or an answer of a program, so a new child finds none in its memory.
Both processes have one thread, so killing the two leaves nothing running.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import gc
import importlib
import os
import random
import resource
import select
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

sys.path.append("/inside")

from examiner import connection, examine, last_line  # type: ignore[import-not-found]
from player import play  # type: ignore[import-not-found]
from values import receive, send  # type: ignore[import-not-found]

_PRELOAD = """
    abc argparse array ast base64 bisect builtins calendar cmath collections collections.abc contextlib copy csv dataclasses
    datetime decimal enum fractions functools hashlib heapq html inspect io itertools json logging math numbers operator os
    pickle pprint queue random re secrets shutil statistics string struct sys tempfile textwrap threading time
    traceback types typing unittest urllib.parse uuid warnings xml.etree.ElementTree zipfile zoneinfo
"""
_HEAVY = ("numpy", "numpy.random")
"""Loaded when the first program mentions numpy, since a smaller process forks faster."""
_WORK = "/box"
_PACKAGES = "/packages"
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _PR_SET_CHILD_SUBREAPER = 22, 2, 36
_MOST_FILES = 1000
"""Files, folders and links that a check may have in the work folder at a time: each takes about a KiB of kernel memory."""


class _Filter(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> NoReturn:
    """Reads requests until the other side closes the channel."""
    requests, answers = os.dup(0), os.dup(1)
    _null()
    os.environ.clear()
    os.chdir(_WORK)
    settings = receive(requests)
    if settings is None:
        os._exit(0)
    sys.path.append(_PACKAGES)
    _load(_PRELOAD.split())
    code = base64.b64decode(settings["filter"])
    program = _Filter(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    send(answers, {"ready": sys.version})
    while (request := receive(requests)) is not None:
        if request["heavy"] and _HEAVY[0] not in sys.modules:
            _load(_HEAVY)
        verdict = _judge(float(request["seconds"]), requests, settings, libc, program)
        # Files left in the folder would be visible to the next program; a new box is cheaper than a complete clean-up.
        send(answers, {**verdict, "clean": verdict["read"] and _cleaned()})
    os._exit(0)


def _load(names: Iterable[str]) -> None:
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def _null() -> None:
    """Open separate standard streams, since the next program could see flags of a shared open file."""
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)


def _judge(seconds: float, requests: int, settings: Any, libc: Any, program: _Filter) -> dict[str, Any]:
    """One check: {"passed": bool, "error": str, "timeout": bool, "read": whether its messages were read to their end}."""
    end = time.monotonic() + seconds
    answer_out, answer_in = os.pipe()
    examiner = os.fork()
    if examiner == 0:
        _examiner(seconds, requests, settings, libc, program, answer_in)
    os.close(answer_in)
    player, verdict, crowded = 0, None, False
    poll = select.poll()
    poll.register(answer_out, select.POLLIN)
    while verdict is None and (left := end - time.monotonic()) > 0 and not crowded:
        if not poll.poll(min(left * 1000 + 1, 10)):
            crowded = _crowded()
            continue
        message = receive(answer_out)
        if isinstance(message, dict) and "player" in message:
            player = message["player"]
        else:
            verdict = message if isinstance(message, dict) else {"error": ""}
    os.close(answer_out)
    for child in (player, examiner) if verdict and "passed" in verdict else ():
        os.kill(child, signal.SIGKILL)  # both at once: each takes a while to be taken down
    gone = verdict is not None and not verdict.get("passed") and not verdict.get("error")  # by itself: its status says why
    status = _reap(examiner, wait=0.2 if gone else 0.0)
    if player:
        played = _reap(player, wait=0.2 if gone else 0.0)
        status = status or played
    found = {"passed": False, "error": "", "timeout": False, "read": bool(player)}
    if crowded:
        return {**found, "error": f"killed (more than {_MOST_FILES} files)"}
    if verdict is None:
        return {**found, "timeout": True}
    if verdict.get("passed") is True:
        return {**found, "passed": True}
    return {**found, "error": str(verdict.get("error", "")) or _reason(status)}


def _examiner(seconds: float, requests: int, settings: Any, libc: Any, program: _Filter, answer: int) -> NoReturn:
    """Fork the player, run the check, answer, and exit at once, without exit hooks or finalizers."""
    leave = os._exit
    try:
        played = receive(requests)
        ask_out, ask_in = os.pipe()
        say_out, say_in = os.pipe()
        player = os.fork()
        if player == 0:
            _player(played, seconds, settings, libc, program, (ask_out, say_in))
        checked = receive(requests)
        send(answer, {"player": player})
        answer, ask_in, say_out = _confine((answer, ask_in, say_out), seconds, settings, libc, program)
        try:
            examine(checked["setup"], checked["check"], played["entries"], connection(ask_in, say_out))
            send(answer, {"passed": True})
        except BaseException as error:
            send(answer, {"error": last_line(error)})
    finally:
        leave(0)


def _player(played: Any, seconds: float, settings: Any, libc: Any, program: _Filter, descriptors: tuple[int, ...]) -> NoReturn:
    leave = os._exit
    try:
        asked, said = _confine(descriptors, seconds, settings, libc, program)
        play(played["program"], played["entries"], asked, said)
    finally:
        leave(0)


def _confine(descriptors: tuple[int, ...], seconds: float, settings: Any, libc: Any, program: _Filter) -> list[int]:
    """Closes every other descriptor, sets limits and puts the filter on. Returns the descriptors, moved to random numbers."""
    places = random.SystemRandom().sample(range(100, 1000), len(descriptors))
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, place) for number, place in zip(descriptors, places, strict=True)]
    start = 3
    for number in sorted(moved):
        os.closerange(start, number)
        start = number + 1
    os.closerange(start, 4096)
    _null()
    for what, limit in (
        (resource.RLIMIT_AS, settings["memory_mb"] << 20),
        (resource.RLIMIT_CPU, int(seconds) + 2),
        (resource.RLIMIT_FSIZE, settings["disk_mb"] << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
        os._exit(1)
    return moved


def _reap(child: int, *, wait: float) -> int:
    """Kills a child, after `wait` seconds in which it may end by itself, and returns its wait status."""
    end = time.monotonic() + wait
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if time.monotonic() >= end:
            break
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return "killed (memory?)" if number == signal.SIGKILL else f"killed by signal {name}"
    return "the process ended before the check did"


def _crowded() -> bool:
    """Whether the work folder holds more files, folders and links than a check may have: they take kernel memory."""
    found = os.statvfs(_WORK)
    return found.f_files - found.f_ffree > _MOST_FILES


def _cleaned() -> bool:
    """Whether the work folder is empty; a few plain files in it are removed first."""
    try:
        with os.scandir(_WORK) as entries:
            for count, entry in enumerate(entries):
                if count >= 100:
                    return False
                os.unlink(entry.path)  # refuses a folder
        os.utime(_WORK, (0, 0))
        os.chmod(_WORK, 0o700)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
