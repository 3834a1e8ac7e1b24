"""Memory of the process that no tensor in use holds: freed blocks, and compiled matrix products."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL, LARGE = 1 << 16, 1 << 25
"""Bytes; a block of at least this size is a mapping of its own, which ends when it is freed. 32 MiB is glibc's largest."""
UNTRIMMED = 1 << 30
"""Bytes that may be free at the heap's end before they are returned."""
MEASURED = 2
"""Iterations in which freed blocks are returned; in the first, no optimizer has a state before its step."""
SLACK = 1.02
"""Freed blocks are kept up to this many times the memory that these iterations took."""
SECONDS = 0.02
"""Between two looks at the memory."""
PRODUCTS = 64
"""Compiled bfloat16 products kept by each of torch's two caches, 0.27 MiB each; one pass over a model needs about 25."""
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


class Heap:
    """The heap of this process.

    A block that is returned to the system comes back as pages that are cleared one by one: a third of the CPU time of an
    iteration. A heap that keeps all blocks has gaps that no later tensor fits, and took up to three times the memory in use
    (docs/log.md). So blocks are returned in the first `MEASURED` iterations. Later ones are kept, and a thread returns the free
    pages of the heap, gaps included, whenever the process takes more than `SLACK` times what it took by then.

    Nothing changes with another C library than glibc, or where the environment sets MALLOC_MMAP_THRESHOLD_. Results do not
    depend on it. Sources: mallopt(3), malloc_trim(3).
    """

    def __init__(self) -> None:
        self.iterations = self.trims = 0
        self.limit: float | None = None
        """Bytes; None while freed blocks are returned."""
        self.thread: Thread | None = None
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self.libc = libc if libc is not None and hasattr(libc, "gnu_get_libc_version") else None

    def restrict(self) -> None:
        """Return freed blocks to the system and keep few compiled products. Call it before the first product.

        On a CPU, torch compiles a bfloat16 product for every new number of tokens and keeps 1024 of them in each of two caches,
        half a GiB in all. An environment that sets a capacity keeps it. Source: oneDNN's developer guide, "Primitive Cache".
        """
        for name in CACHES:
            os.environ.setdefault(name, str(PRODUCTS))
        self.iterations, self.limit = 0, None
        self._own_mappings(SMALL, SMALL << 1)

    def iterated(self) -> None:
        """An iteration has ended: after the first `MEASURED` of them, freed blocks are kept."""
        self.iterations += 1
        if self.iterations != MEASURED or not self._own_mappings(LARGE, UNTRIMMED):
            return
        self.limit = SLACK * most_resident()
        if self.thread is None:
            self.thread = Thread(target=self._watch, name="collm-heap", daemon=True)
            self.thread.start()

    def _own_mappings(self, least: int, untrimmed: int) -> bool:
        """From now on blocks of at least so many bytes are mappings of their own. Returns False where this cannot be set."""
        if self.libc is None or "MALLOC_MMAP_THRESHOLD_" in os.environ:
            return False
        return bool(self.libc.mallopt(M_MMAP_THRESHOLD, least) and self.libc.mallopt(M_TRIM_THRESHOLD, untrimmed))

    def _watch(self) -> None:
        assert self.libc is not None
        never = Event()
        while not never.wait(SECONDS):
            limit = self.limit
            with suppress(OSError):  # for example, no file can be opened
                if limit is not None and resident() > limit:
                    self.libc.malloc_trim(0)
                    self.trims += 1
                    left = max(limit, SLACK * resident())  # it is in use
                    if self.limit == limit:  # another thread may have begun a run
                        self.limit = left


def resident() -> int:
    """Resident memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def most_resident() -> int:
    """Most resident memory that this process has had, in bytes; `ru_maxrss` counts that of the process that began it, too."""
    words = Path("/proc/self/status").read_text(encoding="utf-8").split()
    return int(words[words.index("VmHWM:") + 1]) << 10 if "VmHWM:" in words else resident()


HEAP = Heap()
