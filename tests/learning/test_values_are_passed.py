"""Values are passed, not left on an object: no attribute in learning/ is written by one method and read by another between the
steps of an update."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FILES = sorted((ROOT / "collm" / "learning").glob("*.py"))
BEGIN = {"__init__", "of", "restore"}
"""What makes an object; attributes that are set there and stay are its parts: modules, optimizers, regressions, settings."""


def assigned(method: ast.FunctionDef) -> dict[str, int]:
    """Attributes of `self` that a method writes -> line."""
    found: dict[str, int] = {}
    for node in ast.walk(method):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.NamedExpr):
            targets = [node.target]
        elif isinstance(node, ast.With):
            targets = [item.optional_vars for item in node.items if item.optional_vars is not None]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            owner = node.args[0] if node.args else None
            if isinstance(owner, ast.Name) and owner.id == "self":
                found["setattr"] = node.lineno
        found |= dict(written(targets))
    return found


def written(targets: list[ast.expr]) -> Iterator[tuple[str, int]]:
    """(attribute of `self`, line) of what is written: the attribute, or something in it. An index is only read."""
    for target in targets:
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            yield target.attr, target.lineno
        elif isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            yield from written([target.value])
        elif isinstance(target, ast.Tuple | ast.List):
            yield from written(target.elts)


def left_on_objects(source: str) -> list[str]:
    """Attributes of `self` that are written outside of what makes the object."""
    found = []
    for cls in [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]:
        for method in [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name not in BEGIN]:
            found += [f"{cls.name}.{method.name} writes self.{name}, line {line}" for name, line in assigned(method).items()]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_method_leaves_a_value_for_another(path: Path) -> None:
    assert left_on_objects(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "self.known = batch", "self.known: int = 1", "self.known += 1", "self.known['a'] = 1", "a, self.known = batch",
        "setattr(self, 'known', 1)", "for self.known in batch: pass", "with batch as self.known: pass",
        "self.known.a = 1", "[a, *self.known] = batch",
    ],
)  # fmt: skip
def test_a_planted_one_is_found(line: str) -> None:
    source = f"class A:\n    def __init__(self):\n        self.part = 1\n    def values(self, batch):\n        {line}\n"
    assert len(left_on_objects(source)) == 1
