# ruff: noqa: E501
"""Programs that would exhaust the machine: kernel memory stays bounded while they run, all of it is free afterwards, and the
next program is judged right."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from collm.errors import SandboxError
from collm.sandbox import Job, Sandbox, Verdict

KERNEL = ("Slab", "Shmem", "PageTables", "KernelStack", "SecPageTables", "Percpu")
LIMIT_MIB = 32
MEMORY_MB, DISK_MB = 256, 4
_LOOP = "import os, sys\nfor i in range(10**8):\n    "
DENIALS = {
    "files": _LOOP + "os.close(os.open(str(i), 65))",
    "folders": _LOOP + "os.mkdir(str(i))",
    "symbolic links": _LOOP + "os.symlink('x' * 200, str(i))",
    "hard links": "open('f', 'w')\n" + _LOOP + "os.link('f', str(i))",
    "long names": _LOOP + "os.close(os.open(str(i) + 'x' * 200, 65))",
    "deep folders": _LOOP + "os.mkdir('d'); os.chdir('d')",
    "sparse files": _LOOP + "f = open(str(i), 'wb'); f.seek(4 * 1024 * 1024 - 1); f.write(b'x')",
    "files renamed": _LOOP + "open('a', 'w').close(); os.rename('a', str(i))",
    "missing names": _LOOP + "os.path.exists('/usr/lib/' + str(i) * 10)",
    "pipes filled": _LOOP + "r, w = os.pipe(); os.set_blocking(w, False); os.write(w, bytes(1 << 20))",
    "pipes enlarged": "import fcntl\n" + _LOOP + "r, w = os.pipe(); fcntl.fcntl(w, 1031, 1 << 20)",
    "descriptors": _LOOP + "os.dup(0)",
    "epolls": "import select\nkept = []\n" + _LOOP + "kept.append(select.epoll())",
    "events": "kept = []\n" + _LOOP + "kept.append(os.eventfd(0))",
    "files in memory": _LOOP + "os.memfd_create(str(i))",
    "shared memory": _LOOP + "open('/dev/shm/' + str(i), 'w')",
    "mappings": "import mmap\nkept = []\n" + _LOOP + "kept.append(mmap.mmap(-1, 4096))",
    "a mapped file": "import mmap\nf = open('f', 'wb+'); f.truncate(1 << 22); m = mmap.mmap(f.fileno(), 1 << 22)\n" + _LOOP + "m[i % (1 << 22)] = 1",
    "memory": "kept = []\n" + _LOOP + "kept.append(bytes(1 << 20))",
    "many small objects": "kept = []\n" + _LOOP + "kept.append([i])",
    "processes": _LOOP + "os.fork()",
    "threads": "import threading\n" + _LOOP + "threading.Thread(target=input).start()",
    "sockets": "import socket\n" + _LOOP + "socket.socket()",
    "locks": "import fcntl\nf = open('f', 'wb+'); f.truncate(1 << 22)\n" + _LOOP + "fcntl.lockf(f, fcntl.LOCK_EX, 1, 2 * i)",
    "output without end": "while True: print('x' * 10**6)",
    "a large result": "def f(): return 'x' * (1 << 26)",
    "results without end": "import os\ndef f():\n    for n in range(3, 1024):\n        try:\n            while True: os.write(n, bytes(1 << 16))\n        except OSError: pass",
    "a huge number": "def f(): return 1 << (1 << 28)",
    "nested without end": "def f():\n    x = []\n    for _ in range(10**6): x = [x]\n    return x",
}  # fmt: skip


def user_mebibytes(box: Sandbox) -> float:
    """Memory that the box's own processes hold: bubblewrap, and what it has started."""
    status = {}
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            status[path.parent.name] = dict(line.split(":", 1) for line in path.read_text().splitlines())
        except OSError:
            continue  # it has just ended
    ours = {str(one._process.pid) for one in box._boxes}
    while more := {pid for pid, fields in status.items() if fields["PPid"].strip() in ours} - ours:
        ours |= more
    return sum(int(status[pid].get("RssAnon", "0 kB").split()[0]) for pid in ours & status.keys()) / 1024


def mebibytes(names: tuple[str, ...]) -> float:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in names if name in fields) / 1024


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    try:
        sandbox = Sandbox(1, memory_mb=MEMORY_MB, disk_mb=DISK_MB, cache=0)
    except SandboxError as error:
        pytest.skip(f"programs cannot be isolated here: {error}")
    with sandbox:
        yield sandbox


def test_they_are_many() -> None:
    assert len(DENIALS) >= 26


@pytest.mark.slow
@pytest.mark.parametrize("name", DENIALS)
def test_kernel_memory_stays_bounded_and_all_is_free_afterwards(box: Sandbox, name: str) -> None:
    def measured() -> tuple[float, float, Verdict]:
        """Largest growth of kernel memory during the job, growth of kernel and own memory after it, and the verdict of the next job."""
        peak, over = 0.0, threading.Event()
        before, user_before = mebibytes(KERNEL), user_mebibytes(box)

        def watch() -> None:
            nonlocal peak
            while not over.wait(0.01):
                peak = max(peak, mebibytes(KERNEL) - before)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            [[verdict]] = box.judge([Job(DENIALS[name], ("f() if 'f' in globals() else None\nf()",), 1.0, entries=("f",))])
        finally:
            over.set()
            watcher.join()
        assert not verdict.passed
        [[after]] = box.judge([Job("def f(): return 3", ("assert f() == 3",))])
        time.sleep(0.05)
        return peak, mebibytes(KERNEL) - before + user_mebibytes(box) - user_before, after

    for attempt in range(8):  # other processes use kernel memory, too
        peak, left, after = measured()
        assert after == Verdict(True)
        if peak < LIMIT_MIB and left < LIMIT_MIB:
            print(f"{name}: {peak:.1f} MiB of kernel memory during the job, {left:.1f} MiB more after it")
            return
        print(f"{name}, attempt {attempt}: {peak:.1f}, {left:.1f} MiB")
        time.sleep(3)
    assert (peak < LIMIT_MIB, left < LIMIT_MIB) == (True, True), f"{peak:.1f} MiB during, {left:.1f} MiB after"
