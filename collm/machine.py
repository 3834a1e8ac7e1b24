"""What this process may use of the machine: cores and memory."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory that this process may use: the machine's, or the limit of its control group where that is smaller.

    None if it is unknown. Source: control groups of version 2, file `memory.max`; of version 1, `memory.limit_in_bytes`.
    """
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    return min([whole, *_limits()])


def _limits() -> list[int]:
    """Limits, in bytes, of the control groups that hold this process, those around them included."""
    try:
        lines = [line.split(":", 2) for line in OF_PROCESS.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return []
    found = []
    for _, kinds, path in lines:
        if kinds not in ("", "memory"):
            continue
        root, name = (GROUPS, "memory.max") if kinds == "" else (GROUPS / "memory", "memory.limit_in_bytes")
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                text = _read(folder / name)
                found += [int(text)] if text.isdecimal() else []
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
