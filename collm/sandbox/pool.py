"""Runs programs that a model wrote, and returns which checks they pass.

    verdicts = judge([Job(program="def add(a, b):\n    return a + b", checks=("assert add(1, 2) == 3",))])

A program runs inside bubblewrap, isolated from the user's files, environment, processes and network, with limits on time,
memory, disk and processes. A failure or attack affects only that program's own verdicts. If the isolation is not available,
programs are not run: `SandboxError` gives the reason and the way out. docs/sandbox.md lists the guarantees.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType

from collm.errors import EnvError, SandboxError
from collm.machine import usable_cores
from collm.sandbox.box import Box, self_test
from collm.sandbox.command import command_line
from collm.sandbox.job import Job, Verdict, key_of, one_line

_CLOSED = "this sandbox is closed. Make another one."
_PROGRAM_CHARACTERS = 1_000_000


class Sandbox:
    """A pool of warm boxes; use it as a context manager, or call `close`.

    Every box is a bubblewrap process owned by its own thread. All start at the same time; the first one must pass a
    self-test, in which forbidden operations are tried and must fail. A box that dies is replaced.

    Args:
        workers: Number of boxes, that is of checks running at the same time; default: the machine's usable cores.
        memory_mb: Address space of one check in MiB.
        disk_mb: Size of a box's work folder, and of one file in it, in MiB; the folder is in memory.
        cache: Number of jobs whose verdicts are cached. Jobs with a check that timed out or was killed are not cached,
            since the machine may have caused that.

    Raises:
        SandboxError: Programs cannot be isolated on this machine.
        EnvError: An argument is out of range.
    """

    def __init__(self, workers: int | None = None, *, memory_mb: int = 1024, disk_mb: int = 16, cache: int = 4096) -> None:
        workers = usable_cores() if workers is None else workers
        for name, value, low in (
            ("workers", workers, 1),
            ("memory_mb", memory_mb, 128),
            ("disk_mb", disk_mb, 1),
            ("cache", cache, 0),
        ):
            if value < low:
                raise EnvError(f"{name}={value} of the sandbox must be at least {low}.")
        self._settings = {"memory_mb": memory_mb, "disk_mb": disk_mb}
        self._command = command_line(disk_mb)
        self._cache: OrderedDict[bytes, list[Verdict]] = OrderedDict()
        self._cache_size = cache
        self._lock = threading.Lock()
        self._closed = False
        self._boxes: set[Box] = set()
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
        keys = [key_of(job) for job in jobs]
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
        """End all boxes and wait for them; pending calls of `judge` raise SandboxError. A second call does nothing."""
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
        """The main function of a thread. It owns its box, since --die-with-parent refers to the thread that started it."""
        box: Box | None = None
        try:
            box = self._new_box()
            if first:
                self_test(box)
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

    def _new_box(self) -> Box:
        box = Box(self._command, self._settings)
        with self._lock:
            self._boxes.add(box)
            if self._closed:
                box.kill()
        return box

    def _drop(self, box: Box | None) -> None:
        """Close a box of this pool; a second call does nothing."""
        with self._lock:
            if box is None or box not in self._boxes:
                return
            self._boxes.remove(box)
        box.close()

    def _judge_one(self, job: Job, box: Box | None) -> tuple[list[Verdict], Box | None, bool]:
        """(the job's verdicts, the box for the next job, whether the verdicts may be cached)."""
        if len(job.program) > _PROGRAM_CHARACTERS:
            why = f"not run: the program is longer than {_PROGRAM_CHARACTERS} characters"
            return [Verdict(False, why)] * len(job.checks), box, True
        verdicts: list[Verdict] = []
        timeouts, keep = 0, True
        for check in job.checks:
            if timeouts >= job.max_timeouts:
                verdicts.append(Verdict(False, f"not run: {timeouts} checks timed out before"))
                continue
            if box is not None and not box.alive:  # it ended while idle, so no program caused that
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
            verdicts.append(Verdict(answer["passed"] is True, one_line(answer["error"])))
        return verdicts, box, keep

    def _remember(self, job: Job, verdicts: list[Verdict]) -> None:
        with self._lock:
            self._cache[key_of(job)] = verdicts
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)


_pool: Sandbox | None = None
_pool_owner = 0
_pool_lock = threading.Lock()


def judge(jobs: Sequence[Job]) -> list[list[Verdict]]:
    """`Sandbox.judge` of the process-wide pool, which is made on the first call and closed when the process ends.

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
