"""One box: a bubblewrap process with a warm interpreter inside, the channel to it, and its self-test."""

from __future__ import annotations

import base64
import json
import os
import select
import struct
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from collm.errors import SandboxError
from collm.sandbox.command import WAY_OUT
from collm.sandbox.job import Job, free_names, one_line
from collm.sandbox.seccomp import seccomp_filter

_START_SECONDS = 30.0
_GRACE_SECONDS = 5.0  # after a check's own limit; then the whole box is replaced


class Box:
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
                raise SandboxError(f"bubblewrap could not be started: {error}. {WAY_OUT}") from error
            filter_ = base64.b64encode(seccomp_filter("program")).decode()
            try:
                ready = self._ask(_START_SECONDS, {**settings, "filter": filter_})
                if ready is None:
                    complaints.seek(0)
                    words = one_line(complaints.read(2000).decode(errors="replace").strip()) or "it ended without a word"
                    raise SandboxError(f"bubblewrap could not make the box that programs run in: {words}. {WAY_OUT}")
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
        """End the box from any thread; its owner still has to close it."""
        self._process.kill()

    def close(self) -> None:
        """End the box: an idle one exits by itself, so that each parent waits for its child; a busy one is killed."""
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


# Tried once when a sandbox starts: (property that must hold, program, check). The property holds if the check passes.
_REFUSED = "try:\n    {}\nexcept {}:\n    pass\nelse:\n    raise SystemExit"
_FORGED = "try:\n    f()\nexcept RuntimeError:\n    pass\nexcept TypeError:\n    pass\nelse:\n    raise SystemExit"
PROBES = (
    ("a right program passes", "x = 1", "assert x == 1"),
    ("sockets are refused", "import socket\n" + _REFUSED.format("socket.socket()", "PermissionError"), "pass"),
    ("a second process is refused", "import os\n" + _REFUSED.format("os.fork()", "PermissionError"), "pass"),
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
    ("a check sees only plain values", "class E:\n    def __eq__(self, other): return True\ndef f(): return E()", _FORGED),
)


def self_test(box: Box) -> None:
    for promise, program, check in PROBES:
        answer = box.check(Job(program, (check,)), check)
        if answer is None or not answer["passed"]:
            why = one_line(answer["error"]) if answer else "the box died"
            raise SandboxError(
                f"the sandbox's self-test failed: it must hold that {promise}, but {why or 'it does not'}. {WAY_OUT}"
            )
    wrong = box.check(Job("", ("assert False",)), "assert False")
    if wrong is None or wrong["passed"]:
        raise SandboxError(f"the sandbox's self-test failed: a wrong program must fail. {WAY_OUT}")
