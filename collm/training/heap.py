"""Memory of the process that no tensor in use holds: freed blocks, and compiled matrix products."""

from __future__ import annotations

import ctypes
import os
import sys

M_MMAP_THRESHOLD = -3
BLOCK = 1 << 16
"""Bytes; a block of at least this size is a mapping of its own, which ends when it is freed."""
PRODUCTS = 64
"""Compiled bfloat16 products kept by each of torch's two caches, 0.27 MiB each; one pass over a model needs about 25."""
CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def limit_heap() -> None:
    """Make this process return freed blocks to the system and keep few compiled products. Call it before the first product.

    - glibc returns every freed block of 64 KiB or more; nothing changes with another C library. By default it raises this
      threshold to the size of freed blocks, at most 32 MiB. Tensors of many lengths then share a heap whose gaps no later
      tensor fits. Source: mallopt(3).
    - On a CPU, torch compiles a bfloat16 product for every new number of tokens and keeps 1024 of them in each cache, half a
      GiB in all. An environment that sets a capacity keeps it. Source: oneDNN's developer guide, "Primitive Cache".
    """
    for name in CACHES:
        os.environ.setdefault(name, str(PRODUCTS))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, BLOCK)
