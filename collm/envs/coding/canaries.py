"""Canaries: tests with the expected literal changed. A correct program cannot pass both; a forged result can.

No program is run here.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

from collm.envs.coding.programs import Function, parse, source_of
from collm.sandbox.syntax import tree_of

_METHODS = {"assertEqual", "assertEquals", "assertListEqual", "assertDictEqual", "assertTupleEqual", "assertSetEqual"}


def changed(value: Any) -> Any:
    """Another value of the same type, so that a comparison with it fails. None becomes a string.

    Example: changed(3) == 4; changed([]) == [1]
    """
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float() | complex():
            return next(other for other in (value + 1, -value, 0.0) if other != value)
        case str():
            return value + "~"
        case bytes():
            return value + b"~"
        case list():
            return [*value, 1]
        case tuple():
            return (*value, 1)
        case set():
            return {*value, "~"}
        case dict():
            return {**value, "~": 1}
        case _:
            return "~"


@lru_cache(maxsize=8192)
def canary_of(check: str) -> str | None:
    """A check's source with the expected literal changed; None if its test does not compare with a literal by ==.

    The test is the last statement of `def check(...)`, or of the whole source, and must itself be an assert, since an assert
    inside a loop or a branch might not run.
    """
    tree = parse(check)
    if tree is None or not tree.body:
        return None
    inner = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"), None)
    return source_of(tree.body) if _change((inner or tree).body[-1]) else None


@lru_cache(maxsize=8192)
def canary_of_case(source: str, case: str, function: str) -> str | None:
    """The source of a unittest module with one expected literal of one test method changed, or None as in `canary_of`."""
    tree = parse(source)
    for node in tree.body if tree is not None else []:
        if isinstance(node, ast.ClassDef) and node.name == case:
            for member in node.body:
                if isinstance(member, Function) and member.name == function and any(map(_change, member.body)):
                    return source_of(tree.body) if tree is not None else None
    return None


def _change(statement: ast.stmt) -> bool:
    """Change the literal that a statement compares with, in place. Returns whether there was one."""
    match statement:
        case ast.Assert(test=ast.Compare(ops=[ast.Eq()]) as compare):
            pair = [compare.left, compare.comparators[0]]
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name), args=[_, _, *_] as args)):
            if name not in _METHODS:
                return False
            pair = args[:2]
        case _:
            return False
    literal = [_is_literal(node) for node in pair]
    if sum(literal) != 1:
        return False
    place = literal.index(True)
    value = ast.literal_eval(pair[place])
    other = changed(value)
    if other == value:
        return False
    [made] = tree_of(repr(other)).body
    assert isinstance(made, ast.Expr)
    node = made.value
    match statement:
        case ast.Expr(value=ast.Call() as call):
            call.args[place] = node
        case ast.Assert(test=ast.Compare() as compare) if place == 0:
            compare.left = node
        case ast.Assert(test=ast.Compare() as compare):
            compare.comparators[0] = node
    return True


def _is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


NEEDED = """

def _otherwise(function):
    def changed(value):
        kind = type(value)
        if kind is bool:
            return not value
        if kind in (int, float, complex):
            return value + 1
        if kind is str:
            return value + "~"
        if kind is bytes:
            return value + b"~"
        if kind in (list, tuple):
            return kind([*map(changed, value), 1])
        if kind is set:
            return {"~"} | value
        if kind is dict:
            return {**{key: changed(one) for key, one in value.items()}, "~": 1}
        return "~" if value is None else None
    def other(*args, **named):
        return changed(function(*args, **named))
    return other

"""
"""Source text that wraps functions of a program so that they return a changed value."""


def with_other_results(program: str, names: list[str]) -> str:
    """The program with the return values of these functions changed."""
    return program + NEEDED + "".join(f"{name} = _otherwise({name})\n" for name in names)
