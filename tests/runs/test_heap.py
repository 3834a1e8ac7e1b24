"""Freed tensors leave the process, and only a few compiled products stay."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Thread

import pytest
import torch

from collm.runs.heap import CACHES, Heap

BLOCKS = """
import sys
import time
import torch
from collm.runs.heap import HEAP, resident

start, stay = resident(), []

def update(size):
    \"\"\"Blocks between small ones that stay. Returns the MiB taken while they are in use, and after they are freed.\"\"\"
    large = []
    for _ in range(100):
        large.append(torch.ones(size))
        stay.append(torch.ones(1 << 12))
    time.sleep(0.3)
    held = resident()
    del large
    return (held - start) >> 20, (resident() - start) >> 20

if sys.argv[1] == "restricted":
    HEAP.restrict()
torch.ones(7 << 20)  # freeing this block of 28 MiB raises glibc's own threshold to that
print(*update(1 << 20))
if sys.argv[1] == "restricted":
    HEAP.iterated()
    assert HEAP.limit is None
    HEAP.iterated()
if sys.argv[2] == "unwatched":
    HEAP.limit = None
print(*update(1 << 20))
print(*update((1 << 20) + (1 << 16)))  # none fits where the blocks before were
print(HEAP.trims)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc alone keeps freed blocks")
@pytest.mark.parametrize(
    ("kind", "watched", "setting"),
    [
        ("free", "unwatched", None),
        ("free", "unwatched", 1 << 16),
        ("restricted", "watched", None),
        ("restricted", "unwatched", None),
        ("restricted", "watched", 1 << 16),
    ],
)
def test_freed_blocks_are_kept_within_what_the_first_iterations_took(
    kind: str, watched: str, setting: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times 100 blocks of 4 MiB between small ones, as in updates."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if setting:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(setting))
    words = [sys.executable, "-c", BLOCKS, kind, watched]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120).stdout
    *three, trims = ([int(word) for word in line.split()] for line in done.splitlines())
    (first, _), (second, _), (third, _) = three
    assert 390 < first < 430, done
    left = [after > 300 for _, after in three]  # freed blocks are still there
    kept = setting is None  # else the environment decides, and every block is returned
    assert left == [kept and kind == "free", kept, kept], done
    bounded = watched == "watched" or not kept
    assert max(second, third) < 500 if bounded else third > 600, done
    assert (trims[0] > 0) == (bounded and kept), done


PRODUCTS = """
import sys
from pathlib import Path
import torch
from collm.runs.heap import HEAP

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "limited":
    HEAP.restrict()
torch.set_num_threads(1)
weight = torch.randn(64, 64).bfloat16()
before = resident()
for tokens in range(2, 402):
    torch.nn.functional.linear(torch.ones(tokens, 64).bfloat16(), weight)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU compiles no bfloat16 products")
@pytest.mark.parametrize("kind", ["limited", "unlimited"])
def test_products_of_many_lengths_are_not_kept(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHES:
        monkeypatch.delenv(name, raising=False)  # a run in this process may have set it
    done = subprocess.run([sys.executable, "-c", PRODUCTS, kind], capture_output=True, text=True, check=True, timeout=120)
    assert (float(done.stdout) < 80) == (kind == "limited"), done.stdout


def small() -> Heap:
    """The heap of a process with a limit of one byte, which nobody looks at."""
    heap = Heap()
    if heap.libc is None:
        pytest.skip("glibc alone keeps freed blocks")
    heap.limit = 1.0
    return heap


def watched(heap: Heap, until: Callable[[], bool]) -> float | None:
    """Let the thread look until then, and a little longer. Returns the limit."""
    Thread(target=heap._watch, daemon=True).start()
    end = time.monotonic() + 60
    while not until():
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    left, heap.limit = heap.limit, None
    return left


def test_a_limit_that_was_changed_during_a_trim_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a run that another thread begins."""
    heap, looks = small(), [0]

    def resident() -> int:
        looks[0] += 1
        if looks[0] == 2:  # after the trim
            heap.limit = 7.0
        return 2

    monkeypatch.setattr("collm.runs.heap.resident", resident)
    assert watched(heap, lambda: looks[0] >= 2) == 7
    assert heap.trims == 1


def test_memory_that_cannot_be_read_does_not_end_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    heap, looks = small(), [0]

    def resident() -> int:
        looks[0] += 1
        if looks[0] == 1:
            raise OSError(24, "Too many open files")
        return 2

    monkeypatch.setattr("collm.runs.heap.resident", resident)
    watched(heap, lambda: heap.trims == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_memory_of_the_process_that_began_this_one_does_not_count() -> None:
    held = bytearray(300 << 20)
    held[:: 1 << 12] = b"1" * len(held[:: 1 << 12])
    words = [sys.executable, "-c", "from collm.runs.heap import most_resident; print(most_resident() >> 20)"]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, close_fds=False)
    assert 0 < int(done.stdout) < 200
