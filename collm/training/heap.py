"""The C library's heap: freed blocks go back to the system."""

from __future__ import annotations

import ctypes
import sys

M_MMAP_THRESHOLD = -3
BLOCK = 1 << 16
"""Bytes; a block of at least this size is a mapping of its own, which ends when it is freed."""


def return_freed_blocks() -> None:
    """Make glibc return every freed block of 64 KiB or more to the system; does nothing with another C library.

    By default glibc raises this threshold to the size of freed blocks, at most 32 MiB. Tensors of many lengths then share a
    heap whose gaps no later tensor fits, and the process grows from iteration to iteration. Source: mallopt(3).
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(M_MMAP_THRESHOLD, BLOCK)
