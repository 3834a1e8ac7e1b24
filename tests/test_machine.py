"""Cores and memory that a process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from collm import machine


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux alone")
def test_usable_cores_are_those_that_the_process_may_use() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("0::/a/b", {"a/memory.max": 1 << 20, "a/b/memory.max": "max"}, 1 << 20),  # the limit of the group around it
        ("0::/a/b", {"a/memory.max": 1 << 20, "a/b/memory.max": 1 << 19}, 1 << 19),
        ("0::/", {"memory.max": 1 << 20}, 1 << 20),  # the root of a container
        ("4:memory:/a\n1:cpu:/\n0::/", {"memory/a/memory.limit_in_bytes": 1 << 20, "memory.max": 1 << 21}, 1 << 20),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": 9223372036854771712}, None),  # no limit, in version 1
        ("1:cpu:/a", {"memory.max": 1 << 20}, None),  # not of this process
        ("0::/a", {"memory.max": "max"}, None),
    ],
)
def test_a_limit_of_memory_counts(
    groups: str, limits: dict[str, int | str], least: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_process = tmp_path / "cgroup"
    of_process.write_text(groups + "\n")
    for name, value in limits.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")
    monkeypatch.setattr(machine, "OF_PROCESS", of_process)
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "fs")
    assert machine.memory() == least or (
        least is None and machine.memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )


def test_memory_without_groups_is_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OF_PROCESS", tmp_path / "none")
    assert machine.memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
