"""Memory of the process that no tensor in use holds: freed blocks, and compiled matrix products."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch

from collm.machine import memory, usable_cores

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
SMALL, LARGE = 1 << 16, 1 << 25
"""Bytes; a block of at least this size is a mapping of its own, which ends when it is freed. 32 MiB is glibc's largest."""
UNTRIMMED = 1 << 30
"""Bytes that may be free at the heap's end before they are returned."""
ROOM = 4
"""Freed blocks are kept by a process that took at most this part of its memory before: a heap with gaps took up to 3 times as
much (docs/log.md)."""
PRODUCTS = 64
"""Compiled bfloat16 products kept by each of torch's two caches, 0.27 MiB each; one pass over a model needs about 25."""
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def limit_heap() -> None:
    """Make this process return freed blocks to the system and keep few compiled products. Call it before the first product.

    - glibc returns every freed block of 64 KiB or more. By default it raises this threshold to the size of freed blocks, at
      most 32 MiB. Tensors of many lengths then share a heap whose gaps no later tensor fits. Source: mallopt(3).
    - On a CPU, torch compiles a bfloat16 product for every new number of tokens and keeps 1024 of them in each cache, half a
      GiB in all. Source: oneDNN's developer guide, "Primitive Cache".

    An environment that sets MALLOC_MMAP_THRESHOLD_ or a capacity keeps it; with another C library, blocks are left to that.
    """
    for name in CACHES:
        os.environ.setdefault(name, str(PRODUCTS))
    _own_mappings(SMALL)


def adapt_heap() -> None:
    """Keep freed blocks from now on where memory allows. Call it after an iteration.

    A block that comes back as a new mapping is cleared page by page: a third of the CPU time of an iteration. So a process
    whose highest memory so far is a quarter of what it may use, or less, keeps blocks; one that has taken three quarters
    returns them again. What a process may use is the machine's memory times its share of the cores.
    """
    whole = memory()
    if whole is None or sys.platform != "linux":
        return
    share = whole * min(1.0, torch.get_num_threads() / usable_cores())
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if taken * ROOM <= share:
        _own_mappings(LARGE)
    elif taken > share * 3 / 4:
        _own_mappings(SMALL)


def _own_mappings(least: int) -> None:
    """From now on, blocks of at least so many bytes are mappings of their own. Results do not depend on it."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, least)
        libc.mallopt(M_TRIM_THRESHOLD, UNTRIMMED if least > SMALL else SMALL << 1)
