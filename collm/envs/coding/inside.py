"""What runs inside the box: a process that is kept warm (the zygote) and forks one child for every check.

Started by `sandbox.py` as a script, with nothing but the standard library and numpy. Both directions of the channel carry
frames: four bytes of length, big endian, then JSON. The zygote never runs a line of a program; the child does, under the
limits and the filter that it has put on itself before, and what it says is believed only with the check's own key:

- The zygote puts 32 random bytes into a pipe, forks, and keeps them. The child reads them after the check raised nothing,
  and answers with a hash of them. Ending early by any way (os._exit, SystemExit, a crash) leaves no answer.
- A check is a process and one thread; killing that one process leaves nothing that runs.
"""

from __future__ import annotations

import base64
import builtins
import ctypes
import fcntl
import gc
import hashlib
import importlib
import json
import math
import os
import random
import resource
import select
import signal
import struct
import sys
import time
import types
import unittest
from contextlib import suppress
from typing import Any, NoReturn

_PRELOAD = """
    abc argparse array ast base64 bisect builtins calendar cmath collections collections.abc contextlib copy csv dataclasses
    datetime decimal enum fractions functools hashlib heapq html inspect io itertools json logging math numbers operator os
    pickle pprint queue random re secrets shutil sqlite3 statistics string struct sys tempfile textwrap threading time
    traceback types typing unittest unittest.mock urllib.parse uuid warnings xml.etree.ElementTree zipfile zoneinfo
    numpy numpy.random
"""
_WORK = "/box"
_PACKAGES = "/packages"
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_ANSWER_BYTES = 1024
_Judges = list[tuple[Any, dict[str, Any]]]


class _Filter(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def main() -> NoReturn:
    """Reads requests until the other side closes the channel."""
    requests, answers = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    os.environ.clear()
    os.chdir(_WORK)
    settings = _receive(requests)
    if settings is None:
        os._exit(0)
    sys.path.append(_PACKAGES)
    for name in _PRELOAD.split():
        with suppress(ImportError):
            importlib.import_module(name)
    code = base64.b64decode(settings["filter"])
    program = _Filter(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    judges = _judges()
    gc.collect()
    gc.freeze()
    _send(answers, {"ready": sys.version})
    while (request := _receive(requests)) is not None:
        verdict = _judge(request, settings, libc, program, judges)
        # A folder that is not trivially empty again would show the next program what this one left: a new box is cheaper
        # than any clever clean-up.
        _send(answers, {**verdict, "clean": _cleaned()})
    os._exit(0)


def _receive(descriptor: int) -> Any:
    head = _read(descriptor, 4)
    body = _read(descriptor, struct.unpack(">I", head)[0]) if head else b""
    return json.loads(body) if body else None


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            return b""
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(descriptor: int, message: Any) -> None:
    body = json.dumps(message).encode()
    rest = struct.pack(">I", len(body)) + body
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _judge(request: Any, settings: Any, libc: Any, program: _Filter, judges: _Judges) -> dict[str, Any]:
    """One check in one child: {"passed": bool, "error": str, "timeout": bool}."""
    key = os.urandom(32)
    key_out, key_in = os.pipe()
    answer_out, answer_in = os.pipe()
    os.write(key_in, key)
    os.close(key_in)
    end = time.monotonic() + request["seconds"]
    child = os.fork()
    if child == 0:
        _child(request, settings, libc, program, judges, (key_out, answer_in))
    os.close(key_out)
    os.close(answer_in)
    answer, late = _listen(answer_out, end)
    os.close(answer_out)
    status = _reap(child, wait=0.0 if answer or late else 0.2)
    if answer == _signature(key):
        return {"passed": True, "error": "", "timeout": False}
    if late:
        return {"passed": False, "error": "", "timeout": True}
    return {"passed": False, "error": _reason(answer, status), "timeout": False}


def _signature(key: bytes) -> bytes:
    return b"P" + hashlib.blake2b(b"the check raised nothing", key=key).digest()


def _listen(descriptor: int, end: float) -> tuple[bytes, bool]:
    """The child's first words, at most `_ANSWER_BYTES` of them, and whether time ran out. A child that ends says b""."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if poll.poll(left * 1000 + 1):
            return os.read(descriptor, _ANSWER_BYTES), False
    return b"", True


def _reap(child: int, *, wait: float) -> int:
    """Kills the child, after `wait` seconds in which it may end by itself, and returns its wait status."""
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


def _reason(answer: bytes, status: int) -> str:
    if answer[:1] == b"E":
        return answer[1:].decode(errors="replace")
    if answer:
        return "wrote to the channel of verdicts"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        return "killed (memory?)" if number == signal.SIGKILL else f"killed by signal {name}"
    return "the process ended before the check did"


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


def _child(request: Any, settings: Any, libc: Any, program: _Filter, judges: _Judges, descriptors: tuple[int, int]) -> NoReturn:
    """Runs the program and its check, answers, and is gone: no exit hook, no finalizer, no second word."""
    leave, write, read, sign = os._exit, os.write, os.read, _signature
    try:
        key_out, answer_in = _hide(*descriptors)
        _limit(request, settings)
        if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) != 0:
            write(answer_in, b"Ethe filter could not be put on")
            leave(1)
        error = _run(request["program"], request["check"], judges)
        write(answer_in, sign(read(key_out, 32)) if error is None else b"E" + error)
    finally:
        leave(0)


def _hide(*descriptors: int) -> list[int]:
    """Moves the descriptors to random numbers and closes every other one but 0, 1 and 2 (the null device)."""
    places = random.SystemRandom().sample(range(100, 1000), len(descriptors))
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, place) for number, place in zip(descriptors, places)]
    start = 3
    for number in sorted(moved):
        os.closerange(start, number)
        start = number + 1
    os.closerange(start, 4096)
    return moved


def _limit(request: Any, settings: Any) -> None:
    cpu = int(request["seconds"]) + 2
    for what, limit in (
        (resource.RLIMIT_AS, settings["memory_mb"] << 20),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, settings["disk_mb"] << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def _judges() -> _Judges:
    """What a check is judged with, and its names as they are before any program could replace them."""
    things: list[Any] = [builtins, math, unittest, unittest.case, unittest.suite, unittest.loader, unittest.runner]
    things += [unittest.TestCase, unittest.TestSuite, unittest.TestLoader, unittest.TestResult, unittest.TextTestRunner]
    things += [unittest.TextTestResult, unittest.suite.BaseTestSuite, unittest.case.FunctionTestCase]
    return [(thing, dict(vars(thing))) for thing in things]


def _run(program: str, check: str, judges: _Judges) -> bytes | None:
    """None if neither raised, else the last line of the traceback.

    The program is a module named "solution", so that classes pickle and dataclasses find their module; code below
    `if __name__ == "__main__"` does not run. Between program and check the built-in functions, unittest and the table of
    modules are put back.
    """
    run, last_line, put, trace, profile = exec, _last_line, setattr, sys.settrace, sys.setprofile
    modules, loaded = sys.modules, dict(sys.modules)
    module = types.ModuleType("solution")
    names = module.__dict__
    modules["solution"] = modules["__main__"] = module
    loaded |= {"solution": module, "__main__": module}
    sys.argv[:] = ["solution.py"]
    random.seed(0)
    if "numpy" in modules:
        modules["numpy"].random.seed(0)
    gc.enable()
    try:
        check_code = compile(check, "check.py", "exec", dont_inherit=True)
        run(compile(program, "solution.py", "exec", dont_inherit=True), names)
        trace(None)
        profile(None)
        modules.update(loaded)
        for thing, before in judges:
            now = thing.__dict__
            for name, value in before.items():
                if now.get(name) is not value:
                    put(thing, name, value)
        names["__builtins__"] = judges[0][0]
        run(check_code, names)
    except BaseException as error:
        return last_line(error)
    return None


def _last_line(error: BaseException) -> bytes:
    name = "an exception"
    try:
        name = type.__getattribute__(type(error), "__name__")
        text = str(error)[:400]
        return (f"{name}: {text}" if text else name).encode("ascii", "replace")[:800]
    except BaseException:
        return str(name).encode("ascii", "replace")[:200]


if __name__ == "__main__":
    main()
