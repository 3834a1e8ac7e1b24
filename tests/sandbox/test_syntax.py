"""Programs are parsed in threads."""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from collm.sandbox.syntax import tree_of

SOURCE = "def f(x):\n" + "".join(f"    y{i} = [x + {i} * (x - {i}), {{'a': x}}]\n" for i in range(60)) + "    return x\n"


class Garbage:
    """A cycle whose finalizer runs Python, so that a collection in the middle of parsing changes threads."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        for _ in range(50):
            pass


def num_broken(parse: Callable[[str], object]) -> int:
    """How many of 400 calls in eight threads raise SystemError."""

    def call(_: int) -> bool:
        for _ in range(20):
            Garbage()
        try:
            parse(SOURCE)
        except SystemError:
            return True
        return False

    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(5)
        with ThreadPoolExecutor(8) as pool:
            return sum(pool.map(call, range(400)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


def test_threads_parse_one_after_the_other():
    assert num_broken(tree_of) == 0


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="the wrong variant fails on Python 3.11 alone")
def test_the_wrong_variant_fails():
    assert num_broken(ast.parse) > 0
