"""What Python programs say about themselves: definitions, calls and checks, read from their syntax trees alone.

Nothing here runs a program. Texts may be anything: whatever cannot be parsed is reported as None, never raised.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

LONGEST = 20_000
"""Characters of an answer that are read; a longer one is no program."""

_FENCED = re.compile(r"```[ \t]*[A-Za-z0-9_+.-]{0,20}[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

Function = ast.FunctionDef | ast.AsyncFunctionDef
_TAKEN = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign,
)  # fmt: skip


def code_of(answer: str) -> str:
    """The code in an answer: what stands in its fences, else all of it."""
    if len(answer) > LONGEST:
        return ""
    fenced = _FENCED.findall(answer)
    return "\n".join(fenced) if fenced else answer


def parse(source: str) -> ast.Module | None:
    """The syntax tree, or None for what is no program."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def taken(tree: ast.Module) -> list[ast.stmt]:
    """What of an answer goes into the program: imports, definitions and top-level assignments."""
    return [node for node in tree.body if isinstance(node, _TAKEN)]


def source_of(nodes: Sequence[ast.stmt]) -> str | None:
    """Source text of statements, or None where they are nested too deeply to be written."""
    try:
        return ast.unparse(ast.Module(list(nodes), []))
    except (RecursionError, MemoryError, ValueError):
        return None


def function(nodes: Iterable[ast.stmt], name: str) -> Function | ast.Lambda | None:
    """The last top-level function of that name; `name = lambda ...` is one, too."""
    found: Function | ast.Lambda | None = None
    for node in nodes:
        if isinstance(node, Function) and node.name == name:
            found = node
        elif isinstance(node, (ast.ClassDef, Function)) and node.name == name:
            found = None
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                found = node.value if isinstance(node.value, ast.Lambda) else None
    return found


def defines(nodes: Iterable[ast.stmt], name: str) -> bool:
    """Whether top-level statements bind a name by any definition, assignment or import."""
    return name in {bound for node in nodes for bound in _bound(node)}


def _bound(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Import, ast.ImportFrom)):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                yield inner.id


def returns_something(found: Function | ast.Lambda | None) -> bool:
    """Whether a function can give back a value other than a bare None: by return, or as a generator."""
    if found is None or isinstance(found, ast.Lambda):
        return found is not None
    for node in own_nodes(found):
        if isinstance(node, (ast.Yield, ast.YieldFrom)):
            return True
        if isinstance(node, ast.Return) and not _is_none(node.value):
            return True
    return False


def _is_none(value: ast.expr | None) -> bool:
    return value is None or (isinstance(value, ast.Constant) and value.value is None)


def own_nodes(found: Function | ast.Lambda) -> Iterator[ast.AST]:
    """The nodes of a function's own body, without those of functions and classes defined in it."""
    waiting: list[ast.AST] = list(found.body) if isinstance(found.body, list) else [found.body]
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


@dataclass(frozen=True, slots=True)
class Use:
    """How one program uses a team-mate's function."""

    calls: bool
    """Its entry point calls it, itself or through functions of its own."""
    thin: bool
    """The entry point does nothing but pass the call on."""
    ignored: bool
    """What the calls return is never looked at."""


def use_of(nodes: Sequence[ast.stmt], entry_point: str, names: Sequence[str]) -> Use:
    """How the entry point among `nodes` uses functions that others define under `names`.

    A name that these statements bind themselves is not the team-mate's, nor is one that a function has as a local.
    Thin, after the docstring: nothing; one return that holds a call; or one assignment that holds a call, then a return.
    """
    theirs = {name for name in names if not defines(nodes, name)}
    found = function(nodes, entry_point)
    reached = _reached(nodes, found)
    calls = [(one, call) for one in reached for call in _calls(one, theirs)]
    ignored = bool(calls) and all(_is_ignored(one, call) for one, call in calls)
    return Use(bool(calls), found is not None and _is_thin(found, theirs), ignored)


def _reached(nodes: Sequence[ast.stmt], found: Function | ast.Lambda | None) -> list[Function | ast.Lambda]:
    """The entry point and the functions of the same statements that it calls, directly or not."""
    reached: list[Function | ast.Lambda] = []
    waiting = [found]
    while waiting:
        one = waiting.pop()
        if one is None or any(one is other for other in reached):
            continue
        reached.append(one)
        called = {node.id for node in ast.walk(one) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        waiting += [function(nodes, name) for name in sorted(called)]
    return reached


def _calls(one: Function | ast.Lambda, names: set[str]) -> list[ast.Call]:
    local = {arg.arg for node in ast.walk(one) if isinstance(node, ast.arguments) for arg in _arguments(node)}
    for node in ast.walk(one):
        if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
            local.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node is not one:
            local.add(node.name)
    wanted = names - local
    return [n for n in ast.walk(one) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in wanted]


def _arguments(node: ast.arguments) -> list[ast.arg]:
    single = [arg for arg in (node.vararg, node.kwarg) if arg is not None]
    return [*node.posonlyargs, *node.args, *node.kwonlyargs, *single]


def _is_ignored(one: Function | ast.Lambda, call: ast.Call) -> bool:
    """Whether a call stands alone as a statement, or its result goes to names that are never read."""
    for node in ast.walk(one):
        value = getattr(node, "value", None)
        if isinstance(value, ast.Await):
            value = value.value
        if value is not call:
            continue
        if isinstance(node, ast.Expr):
            return True
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [inner for target in targets for inner in ast.walk(target) if isinstance(inner, ast.expr)]
            if not all(isinstance(inner, (ast.Name, ast.Tuple, ast.List, ast.Starred)) for inner in stored):
                return False  # kept in an object or a container
            kept = {inner.id for inner in stored if isinstance(inner, ast.Name)}
            read = {n.id for n in ast.walk(one) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            return not kept & read
    return False


def _is_thin(found: Function | ast.Lambda, names: set[str]) -> bool:
    def holds_call(node: ast.AST) -> bool:
        return any(isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id in names for n in ast.walk(node))

    if isinstance(found, ast.Lambda):
        return holds_call(found.body)
    body = found.body
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
        body = body[1:]
    if not body or (len(body) == 1 and isinstance(body[0], ast.Pass)):
        return True
    if len(body) == 1:
        return isinstance(body[0], ast.Return) and holds_call(body[0])
    if len(body) == 2:
        return isinstance(body[0], (ast.Assign, ast.AnnAssign)) and holds_call(body[0]) and isinstance(body[1], ast.Return)
    return False


def split_checks(test: str, entry_point: str) -> tuple[str, ...]:
    """The checks of a `def check(candidate)`: one for each top-level statement of it that holds an assert.

    Each is a source text of its own: what stands outside of `check`, the set-up statements before the assert, the assert. A
    test without such statements is one check.
    """
    tree = parse(test)
    whole = f"{test}\n\ncheck({entry_point})\n"
    found = None if tree is None else next((n for n in tree.body if isinstance(n, Function) and n.name == "check"), None)
    if tree is None or not isinstance(found, ast.FunctionDef):
        return (whole,)
    setup: list[ast.stmt] = []
    checks = []
    for statement in found.body:
        if any(isinstance(node, ast.Assert) for node in ast.walk(statement)):
            only = ast.FunctionDef(found.name, found.args, [*setup, statement], [], None, None)
            parts = [only if node is found else node for node in tree.body]
            written = source_of([ast.fix_missing_locations(part) for part in parts])
            checks.append(f"{written}\ncheck({entry_point})\n" if written is not None else whole)
        else:
            setup.append(statement)
    return tuple(checks) or (whole,)
