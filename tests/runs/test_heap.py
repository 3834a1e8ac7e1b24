"""Freed tensors leave the process, and only a few compiled products stay."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from collm.runs.heap import CACHES

BLOCKS = """
import sys
from pathlib import Path
import torch
from collm.runs import heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] != "never limited":
    heap.limit_heap()
for gib in sys.argv[2:]:  # of memory, at each call
    heap.memory = lambda: int(float(gib) * 2**30)
    heap.adapt_heap()
torch.ones(7 << 20)  # freeing this block of 28 MiB raises glibc's own threshold to that
before = resident()
stay = []
large = []
for n in range(100):
    large.append(torch.ones((1 << 20) + n))
    stay.append(torch.ones(1 << 12))
held = resident() - before
del large
print(held, resident() - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc alone keeps freed blocks")
@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["never limited"], True),
        (["limited"], False),
        (["limited", "1000"], True),  # a process of less than 1 GiB
        (["limited", "0.5"], False),
        (["limited", "1000", "0.05"], False),  # memory became short
        (["MALLOC_MMAP_THRESHOLD_=65536", "1000"], False),
        (["MALLOC_MMAP_THRESHOLD_=33554432"], True),
    ],
)
def test_freed_tensors_leave_the_process(words: list[str], kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of many sizes between small ones that stay, as in an update. They are kept only where memory allows."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if "=" in words[0]:
        monkeypatch.setenv(*words[0].split("="))
    done = subprocess.run([sys.executable, "-c", BLOCKS, *words], capture_output=True, text=True, check=True, timeout=120)
    held, left = map(float, done.stdout.split())
    assert held > 350
    assert left > 200 if kept else left < 50, (held, left)


PRODUCTS = """
import sys
from pathlib import Path
import torch
from collm.runs.heap import limit_heap

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

if sys.argv[1] == "limited":
    limit_heap()
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
