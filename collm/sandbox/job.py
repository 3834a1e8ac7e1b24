"""A job, which is a program with its checks, and the verdict on each check."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache

from collm.errors import EnvError
from collm.sandbox.syntax import tree_of

_ERROR_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Job:
    """One program and the checks it is judged by.

    Example: `Job("def add(a, b):\\n    return a + b", ("assert add(1, 2) == 3", "assert add(0, 0) == 0"))`.
    """

    program: str
    """Source, executed in a fresh process for every check, as a module named "solution"."""
    checks: tuple[str, ...]
    """Source texts, each run in another process; a check passes if neither it nor the program raises. Names that a check reads
    and does not define refer to the program: its functions, classes and plain values."""
    seconds: float = 10.0
    """Wall-clock limit of one check in seconds, the program included."""
    max_timeouts: int = 3
    """After so many checks timed out, the remaining checks are not run and count as failed."""
    entries: tuple[str, ...] = ()
    """Additional names that refer to the program, for example one that Python also defines."""
    setup: str = ""
    """Trusted source that runs before each check: imports and functions that the problem itself gives."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise EnvError(f"seconds={self.seconds!r} of a job must lie above 0 and not above 3600. Try seconds=10.")
        if self.max_timeouts < 1:
            raise EnvError(f"max_timeouts={self.max_timeouts!r} of a job must be at least 1. Try max_timeouts=3.")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on one check."""

    passed: bool
    error: str = ""
    """The reason of a failure in one line of at most 200 printable ASCII characters. An exception's text is the program's."""


def key_of(job: Job) -> bytes:
    text = json.dumps([job.program, job.checks, job.entries, job.setup, job.seconds, job.max_timeouts])
    return hashlib.sha256(text.encode()).digest()


def one_line(text: str) -> str:
    """One line of printable ASCII, cut to 200 characters."""
    clean = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text[: 4 * _ERROR_CHARACTERS])
    return " ".join(clean.split())[:_ERROR_CHARACTERS]


@lru_cache(maxsize=4096)
def free_names(setup: str, check: str) -> tuple[str, ...]:
    """Names that a check reads and that neither it, its set-up nor Python defines; they refer to the program."""
    read: set[str] = set()
    bound: set[str] = set()
    for source in (setup, check):
        try:
            tree = tree_of(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).split(".")[0])
            elif isinstance(node, ast.ExceptHandler) and node.name:
                bound.add(node.name)
    return tuple(sorted(name for name in read - bound if not hasattr(builtins, name)))
