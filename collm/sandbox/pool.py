"""Runs programs that a model wrote, and says which checks they pass.

    verdicts = judge([Job(program="def add(a, b):\n    return a + b", checks=("assert add(1, 2) == 3",))])

A program runs inside bubblewrap, apart from the user's files, environment, processes and network, with limits on time,
memory, disk and processes. Whatever it does costs that program its points and nothing else. Where the isolation cannot be
had there is no fallback: `SandboxError` says why and what to do. docs/sandbox.md says what is and is not promised.
"""

from __future__ import annotations

import ast
import atexit
import base64
import builtins
import hashlib
import json
import os
import queue
import select
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from collm.errors import EnvError, SandboxError
from collm.sandbox.seccomp import seccomp_filter

_INSIDE = Path(__file__).with_name("inside")
_START_SECONDS = 30.0
_CLOSED = "this sandbox is closed. Make another one."
_GRACE_SECONDS = 5.0  # beyond a check's own limit, before its whole box is given up
_ERROR_CHARACTERS = 200
_PROGRAM_CHARACTERS = 1_000_000


@dataclass(frozen=True, slots=True)
class Job:
    """One program and the checks it is judged by.

    Example: `Job("def add(a, b):\\n    return a + b", ("assert add(1, 2) == 3", "assert add(0, 0) == 0"))`.
    """

    program: str
    """Source, executed in a fresh process for every check, as a module named "solution"."""
    checks: tuple[str, ...]
    """Each a source text that runs in another process; it passes if neither it nor the program raises. Names that it reads and
    that nothing else defines are the program's: functions, classes and plain values."""
    seconds: float = 10.0
    """Wall-clock limit of one check in seconds, the program included."""
    max_timeouts: int = 3
    """After so many checks that timed out, the rest is not run and counts as failed."""
    entries: tuple[str, ...] = ()
    """More names that are the program's, for example one that Python defines, too."""
    setup: str = ""
    """Trusted source that runs before each check: imports and functions that the problem itself gives."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise EnvError(f"seconds={self.seconds!r} of a job must lie above 0 and not above 3600. Try seconds=10.")
        if self.max_timeouts < 1:
            raise EnvError(f"max_timeouts={self.max_timeouts!r} of a job must be at least 1. Try max_timeouts=3.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one check."""

    passed: bool
    error: str = ""
    """Why not, in one line of printable ASCII, at most 200 characters; the words of an exception are the program's own."""


class Sandbox:
    """A pool of warm boxes; use it as a context manager, or call `close`.

    Every box is a bubblewrap process owned by a thread of its own. They start at once; the first one must pass a
    self-test, in which forbidden things are tried and must fail. A box that dies is replaced.

    Args:
        workers: Boxes, that is checks running at the same time; the machine's usable cores if left out.
        memory_mb: Address space of one check in MiB.
        disk_mb: Size of a box's work folder, and of one file in it, in MiB; it lies in memory.
        cache: How many jobs' verdicts are kept. A job of which a check timed out, or was killed, is not kept:
            that may have been the machine's fault.

    Raises:
        SandboxError: Programs cannot be isolated here.
        EnvError: An argument is out of range.
    """

    def __init__(self, workers: int | None = None, *, memory_mb: int = 1024, disk_mb: int = 16, cache: int = 4096) -> None:
        workers = len(os.sched_getaffinity(0)) if workers is None and sys.platform == "linux" else workers or 1
        for name, value, low in (
            ("workers", workers, 1),
            ("memory_mb", memory_mb, 128),
            ("disk_mb", disk_mb, 1),
            ("cache", cache, 0),
        ):
            if value < low:
                raise EnvError(f"{name}={value} of the sandbox must be at least {low}.")
        self._settings = {"memory_mb": memory_mb, "disk_mb": disk_mb}
        self._command = _command(disk_mb)
        self._cache: OrderedDict[bytes, list[Verdict]] = OrderedDict()
        self._cache_size = cache
        self._lock = threading.Lock()
        self._closed = False
        self._boxes: set[_Box] = set()
        self._jobs: queue.SimpleQueue[tuple[Job, Future[list[Verdict]]] | None] = queue.SimpleQueue()
        started: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(future, index == 0), name=f"collm-sandbox-{index}", daemon=True)
            for index, future in enumerate(started)
        ]
        for thread in self._threads:
            thread.start()
        try:
            for future in started:
                future.result()
        except BaseException:
            self.close()
            raise

    def judge(self, jobs: Sequence[Job]) -> list[list[Verdict]]:
        """The verdicts of every job's checks, in order. Safe to call from several threads.

        Raises:
            SandboxError: The sandbox is closed, or a box that died could not be replaced.
        """
        asked: dict[bytes, Future[list[Verdict]]] = {}
        known: dict[bytes, list[Verdict]] = {}
        keys = [_key(job) for job in jobs]
        with self._lock:
            if self._closed:
                raise SandboxError(_CLOSED)
            for key, job in zip(keys, jobs):
                if key in self._cache:
                    self._cache.move_to_end(key)
                    known[key] = self._cache[key]
                elif key not in asked:
                    asked[key] = Future()
                    self._jobs.put((job, asked[key]))
        for key, future in asked.items():
            known[key] = future.result()
        return [list(known[key]) for key in keys]

    def close(self) -> None:
        """Ends all boxes and waits until they are gone; who waits for verdicts gets an error. A second call does nothing."""
        with self._lock:
            if not self._closed:
                self._closed = True
                for _ in self._threads:
                    self._jobs.put(None)
            for box in self._boxes:
                box.kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _serve(self, started: Future[None], first: bool) -> None:
        """One thread's life. It owns its box: bubblewrap's --die-with-parent means the thread that started it."""
        box: _Box | None = None
        try:
            box = self._new_box()
            if first:
                _self_test(box)
            started.set_result(None)
        except BaseException as error:
            self._drop(box)
            started.set_exception(error)
            return
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                if self._closed:
                    raise SandboxError(_CLOSED)
                verdicts, box, keep = self._judge_one(job, box)
                if keep:
                    self._remember(job, verdicts)
                future.set_result(verdicts)
            except BaseException as error:
                future.set_exception(error)
                self._drop(box)
                box = None
        self._drop(box)

    def _new_box(self) -> _Box:
        box = _Box(self._command, self._settings)
        with self._lock:
            self._boxes.add(box)
            if self._closed:
                box.kill()
        return box

    def _drop(self, box: _Box | None) -> None:
        """Closes a box that is still ours; a second call does nothing."""
        with self._lock:
            if box is None or box not in self._boxes:
                return
            self._boxes.remove(box)
        box.close()

    def _judge_one(self, job: Job, box: _Box | None) -> tuple[list[Verdict], _Box | None, bool]:
        """The job's verdicts, the box to go on with, and whether the verdicts may be kept."""
        if len(job.program) > _PROGRAM_CHARACTERS:
            why = f"not run: the program is longer than {_PROGRAM_CHARACTERS} characters"
            return [Verdict(False, why)] * len(job.checks), box, True
        verdicts: list[Verdict] = []
        timeouts, keep = 0, True
        for check in job.checks:
            if timeouts >= job.max_timeouts:
                verdicts.append(Verdict(False, f"not run: {timeouts} checks timed out before"))
                continue
            if box is not None and not box.alive:  # it ended while it had nothing to do, so no program is to blame
                self._drop(box)
                box = None
            box = box or self._new_box()
            answer = box.check(job, check)
            if self._closed and answer is None:
                raise SandboxError(_CLOSED)
            answer = answer or {"passed": False, "error": "killed (the box died)", "timeout": False, "clean": False}
            if not answer["clean"]:
                self._drop(box)
                box = None
            if answer["timeout"]:
                timeouts += 1
                answer["error"] = f"timeout after {job.seconds:g} s"
            keep = keep and not answer["timeout"] and not answer["error"].startswith("killed")
            verdicts.append(Verdict(answer["passed"] is True, _line(answer["error"])))
        return verdicts, box, keep

    def _remember(self, job: Job, verdicts: list[Verdict]) -> None:
        with self._lock:
            self._cache[_key(job)] = verdicts
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


class _Box:
    """One bubblewrap process with a warm interpreter inside, and the channel to it."""

    def __init__(self, command: list[str], settings: dict[str, Any]) -> None:
        self._lost = False  # it did not answer in time
        with tempfile.TemporaryFile() as code, tempfile.TemporaryFile() as complaints:
            code.write(seccomp_filter("zygote"))
            code.seek(0)
            try:
                self._process = subprocess.Popen(
                    [command[0], "--seccomp", str(code.fileno()), *command[1:]],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=complaints,
                    pass_fds=(code.fileno(),),
                    env={},
                    cwd="/",
                    bufsize=0,
                )
            except OSError as error:
                raise SandboxError(f"bubblewrap could not be started: {error}. {_WAY_OUT}") from error
            filter_ = base64.b64encode(seccomp_filter("program")).decode()
            try:
                ready = self._ask(_START_SECONDS, {**settings, "filter": filter_})
                if ready is None:
                    complaints.seek(0)
                    words = _line(complaints.read(2000).decode(errors="replace").strip()) or "it ended without a word"
                    raise SandboxError(f"bubblewrap could not make the box that programs run in: {words}. {_WAY_OUT}")
            except BaseException:
                self.close()
                raise

    def check(self, job: Job, check: str) -> dict[str, Any] | None:
        """The zygote's answer; None if the box died. A box that does not answer in time counts as a time-out."""
        end = time.monotonic() + job.seconds + _GRACE_SECONDS
        entries = sorted({*job.entries, *free_names(job.setup, check)})
        played, checked = {"program": job.program, "entries": entries}, {"setup": job.setup, "check": check}
        header = {"seconds": job.seconds, "heavy": any("numpy" in text for text in (job.program, job.setup, check))}
        answer = self._ask(job.seconds + _GRACE_SECONDS, header, played, checked)
        self._lost = answer is None
        if answer is None and time.monotonic() >= end:
            return {"passed": False, "error": "", "timeout": True, "clean": False}
        return answer

    def _ask(self, seconds: float, *messages: dict[str, Any]) -> dict[str, Any] | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        bodies = [json.dumps(message).encode() for message in messages]
        try:
            rest = memoryview(b"".join(struct.pack(">I", len(body)) + body for body in bodies))
            while rest:
                rest = rest[self._process.stdin.write(rest) or 0 :]
        except OSError:
            return None
        head = self._read(4, end)
        answer = self._read(struct.unpack(">I", head)[0], end) if head else None
        return json.loads(answer) if answer else None

    def _read(self, size: int, end: float) -> bytes | None:
        assert self._process.stdout is not None
        data = b""
        poll = select.poll()
        poll.register(self._process.stdout, select.POLLIN)
        while len(data) < size:
            left = end - time.monotonic()
            if left <= 0:
                return None
            if poll.poll(left * 1000 + 1):
                part = os.read(self._process.stdout.fileno(), size - len(data))
                if not part:
                    return None
                data += part
        return data

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the box from any thread; its owner still has to close it."""
        self._process.kill()

    def close(self) -> None:
        """Ends the box: an idle one by itself, so that each process is waited for by its parent; a busy one is killed."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=0 if self._lost else 2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            with suppress(OSError):
                self._read(1, time.monotonic() + 2)  # the channel ends when the last process in the box is gone
            self._process.stdout.close()


_WAY_OUT = (
    "Code that a model wrote is never run without isolation. Install bubblewrap (apt-get install bubblewrap) and allow user "
    "namespaces (sysctl kernel.unprivileged_userns_clone=1; on Ubuntu 24.04 also "
    "kernel.apparmor_restrict_unprivileged_userns=0; in a container, one whose seccomp profile allows them), "
    "or choose a task that runs no code."
)


def _command(disk_mb: int) -> list[str]:
    """The call of bubblewrap: an empty, read-only world with the system's libraries, one Python and a small work folder."""
    if sys.platform != "linux":
        raise SandboxError(f"the sandbox needs Linux, but this is {sys.platform}. Choose a task that runs no code.")
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise SandboxError(f"bubblewrap is not installed: there is no 'bwrap' on the PATH. {_WAY_OUT}")
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    command = [bubblewrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "box"]
    command += ["--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        path = Path(folder)
        if path.is_symlink():
            command += ["--symlink", os.readlink(folder), folder]
        elif path.is_dir():
            command += ["--ro-bind", folder, folder]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    base = Path(sys.base_prefix).resolve()
    if not (base / "lib").is_relative_to("/usr/lib"):
        command += ["--ro-bind", str(base / "lib"), str(base / "lib")]
    command += ["--ro-bind", str(python), str(python)]
    # What the user installed is not the program's business.
    for name in ("purelib", "platlib"):
        packages = Path(sysconfig.get_path(name, vars={"base": str(base), "platbase": str(base)}))
        if packages.is_dir():
            command += ["--tmpfs", str(packages), "--remount-ro", str(packages)]
    # But numpy is every programmer's, and some of the public classes need it.
    for package in _numpy_folders():
        command += ["--ro-bind", str(package), f"/packages/{package.name}"]
    command += ["--dev", "/dev", "--remount-ro", "/dev"]
    command += ["--ro-bind", str(_INSIDE), "/inside", "--size", str(disk_mb << 20), "--tmpfs", "/box"]
    command += ["--remount-ro", "/", "--chdir", "/box", "--setenv", "PYTHONHASHSEED", "0"]
    command += ["--setenv", "OPENBLAS_NUM_THREADS", "1"]
    return [*command, str(python), "-S", "-s", "-B", "-P", "/inside/zygote.py"]


@lru_cache(maxsize=4096)
def free_names(setup: str, check: str) -> tuple[str, ...]:
    """Names that a check reads and that neither it, its set-up nor Python defines: they are the program's."""
    read: set[str] = set()
    bound: set[str] = set()
    for source in (setup, check):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
    return tuple(sorted(name for name in read - bound if not hasattr(builtins, name)))


def _numpy_folders() -> list[Path]:
    """numpy, and the libraries that its wheel brings beside it."""
    package = Path(np.__file__).resolve().parent
    return [folder for folder in (package, package.with_name("numpy.libs")) if folder.is_dir()]


# Tried once when a sandbox starts: (what must hold, program, check). All is well if the check passes.
_REFUSED = "try:\n    {}\nexcept {}:\n    pass\nelse:\n    raise SystemExit"
_FORGED = "try:\n    f()\nexcept RuntimeError:\n    pass\nexcept TypeError:\n    pass\nelse:\n    raise SystemExit"
_PROBES = (
    ("a right program passes", "x = 1", "assert x == 1"),
    ("there is no socket", "import socket\n" + _REFUSED.format("socket.socket()", "PermissionError"), "pass"),
    ("there is no second process", "import os\n" + _REFUSED.format("os.fork()", "PermissionError"), "pass"),
    (
        "no other program starts",
        "import os, sys\n" + _REFUSED.format("os.execv(sys.executable, ['python'])", "PermissionError"),
        "pass",
    ),
    ("no signal is sent", "import os\n" + _REFUSED.format("os.kill(os.getppid(), 0)", "PermissionError"), "pass"),
    (
        "the user's files are not there",
        _REFUSED.format(f"open({str(Path(__file__).resolve())!r})", "FileNotFoundError"),
        "pass",
    ),
    ("processes are not listed", "import os\nassert not os.path.exists('/proc/self')", "pass"),
    ("nothing is written outside the work folder", _REFUSED.format("open('/dev/shm/x', 'w')", "OSError"), "pass"),
    ("the environment is empty", "import os\nassert not os.environ", "pass"),
    ("memory is limited", _REFUSED.format("bytearray(1 << 44)", "MemoryError"), "pass"),
    ("a check sees plain values alone", "class E:\n    def __eq__(self, other): return True\ndef f(): return E()", _FORGED),
)


def _self_test(box: _Box) -> None:
    for promise, program, check in _PROBES:
        answer = box.check(Job(program, (check,)), check)
        if answer is None or not answer["passed"]:
            why = _line(answer["error"]) if answer else "the box died"
            raise SandboxError(
                f"the sandbox's self-test failed: it must hold that {promise}, but {why or 'it does not'}. {_WAY_OUT}"
            )
    wrong = box.check(Job("", ("assert False",)), "assert False")
    if wrong is None or wrong["passed"]:
        raise SandboxError(f"the sandbox's self-test failed: a wrong program must fail. {_WAY_OUT}")


def _key(job: Job) -> bytes:
    text = json.dumps([job.program, job.checks, job.entries, job.setup, job.seconds, job.max_timeouts])
    return hashlib.sha256(text.encode()).digest()


def _line(text: str) -> str:
    """One line of printable ASCII, cut to 200 characters."""
    clean = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text[: 4 * _ERROR_CHARACTERS])
    return " ".join(clean.split())[:_ERROR_CHARACTERS]


_pool: Sandbox | None = None
_pool_owner = 0
_pool_lock = threading.Lock()


def judge(jobs: Sequence[Job]) -> list[list[Verdict]]:
    """`Sandbox.judge` of the process-wide pool, which is made at the first call and closed when the process ends.

    Raises:
        SandboxError: Programs cannot be isolated on this machine.
    """
    global _pool, _pool_owner
    with _pool_lock:
        if _pool is None or _pool_owner != os.getpid():  # a forked process has its parent's memory but not its threads
            _pool, _pool_owner = Sandbox(), os.getpid()
        pool = _pool
    return pool.judge(jobs)


@atexit.register
def _close_pool() -> None:
    if _pool is not None and _pool_owner == os.getpid():
        _pool.close()
