"""Syntax trees of Python source, also where several environments are stepped in threads."""

from __future__ import annotations

import ast
import threading

_ONE = threading.Lock()


def tree_of(source: str) -> ast.Module:
    """`ast.parse(source)`, one thread at a time.

    CPython 3.11 counts the depth of recursion once for all threads and raises SystemError ("AST constructor recursion depth
    mismatch") where a second thread parses in between. Raises as `ast.parse`: SyntaxError, ValueError, RecursionError,
    MemoryError.
    """
    with _ONE:
        return ast.parse(source)
