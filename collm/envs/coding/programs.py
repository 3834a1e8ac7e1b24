"""Definitions, calls and checks of Python programs, read from their syntax trees.

No program is run here. Any text is accepted: for text that cannot be parsed the functions return None and never raise.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from collm.sandbox.syntax import tree_of

LONGEST = 20_000
"""Largest number of characters of an answer; a longer one is not read as a program."""

_READ = 12 * LONGEST
"""Largest number of characters given to the parser for one answer, over all attempts; it bounds the time to a fraction of a
second and suffices for every genuine answer."""

_OPENS = re.compile(r"(?:^[ \t]*|[ \t:])```[ \t]*[A-Za-z0-9_+.-]{0,20}[ \t]*$")
_BEGINS = re.compile(r"[ \t]*(?:async +def|def|class|import|from|@)(?:[ \t]|(?<=@))")

Function = ast.FunctionDef | ast.AsyncFunctionDef
_TAKEN = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign,
)  # fmt: skip


def parse(source: str) -> ast.Module | None:
    """The syntax tree, or None if the source is not a program."""
    try:
        return tree_of(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read(answer: str) -> ast.Module | None:
    """The program in an answer, read leniently; None if there is none.

    An answer that parses, dedented, is taken whole. Otherwise the longest prefix of lines that parses is taken from every
    fenced block, dedented; without such blocks, from the first line that begins a definition or an import. Prose around the
    code, a cut-off example, and an unclosed or additional fence therefore do not matter. The time is bounded for any text.
    """
    if len(answer) > LONGEST:
        return None
    text = answer.replace("\r\n", "\n").replace("\r", "\n")
    whole = parse(text) or parse(textwrap.dedent(text))
    if whole is not None:
        return whole
    lines, left = text.split("\n"), [_READ]
    found = [node for block in _blocks(lines) for node in _prefix(block, left)]
    if taken(ast.Module(found, [])):
        return ast.Module(found, [])
    for start in (number for number, line in enumerate(lines) if _BEGINS.match(line)):
        found = _prefix(lines[start:], left)
        if found:
            return ast.Module(found, [])
        if left[0] <= 0:
            break
    return None


def _blocks(lines: Sequence[str]) -> list[list[str]]:
    """The lines of every fenced block; the last one may be unclosed."""
    blocks: list[list[str]] = []
    inside = False
    for line in lines:
        if not inside and _OPENS.search(line):
            blocks.append([])
            inside = True
        elif inside and line.strip().startswith("```"):
            inside = False
        elif inside:
            blocks[-1].append(line.removesuffix("```"))
            inside = not line.endswith("```")
    return blocks


def _prefix(lines: Sequence[str], left: list[int]) -> list[ast.stmt]:
    """The statements of the longest prefix of lines that parses, dedented by the margin of its first line.

    A prefix that contains the line of a syntax error cannot parse, so each attempt ends before the error of the attempt before.
    `left` holds the number of characters that may still be parsed.
    """
    first = next((line for line in lines if line.strip()), "")
    margin = first[: len(first) - len(first.lstrip())]
    kept = [line.removeprefix(margin) for line in lines]
    while kept and left[0] > 0:
        source = "\n".join(kept) + "\n"
        left[0] -= len(source)
        try:
            return tree_of(source).body
        except SyntaxError as error:
            end = (error.lineno or len(kept)) - 1
        except (ValueError, RecursionError, MemoryError):
            end = len(kept) // 2
        del kept[max(0, min(end, len(kept) - 1)) :]
    return []


def taken(tree: ast.Module) -> list[ast.stmt]:
    """The statements of an answer that go into the program: imports, definitions and top-level assignments."""
    return [node for node in tree.body if isinstance(node, _TAKEN)]


def source_of(nodes: Sequence[ast.stmt]) -> str | None:
    """Source text of statements, or None if they are nested too deeply to be written."""
    try:
        return ast.unparse(ast.Module(list(nodes), []))
    except (RecursionError, MemoryError, ValueError):
        return None


def function(nodes: Iterable[ast.stmt], name: str) -> Function | ast.Lambda | None:
    """The last top-level function of that name; `name = lambda ...` counts as one."""
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
    """Whether a function can return a value other than a literal None, by return or as a generator."""
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
    """The nodes of a function's body, without those of functions and classes defined in it."""
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
    """Whether its entry point calls the function, directly or through other functions of the program."""
    thin: bool
    """Whether the entry point only forwards the call."""
    ignored: bool
    """Whether the results of the calls are never read."""


def use_of(nodes: Sequence[ast.stmt], entry_point: str, names: Sequence[str]) -> Use:
    """How the entry point among `nodes` uses functions that others define under `names`.

    A name that these statements bind, or that is local to a function, does not refer to the team-mate's function.
    Thin, after the docstring: nothing; one return that holds a call; or one assignment that holds a call, then a return.
    """
    bound = {name for node in nodes for name in _bound(node)}
    theirs = {name for name in names if name not in bound}
    found = function(nodes, entry_point)
    used = [(one, _calls(one, theirs)) for one in _reached(nodes, found)]
    calls = any(called for _, called in used)
    ignored = calls and all(_all_ignored(one, called) for one, called in used if called)
    return Use(calls, found is not None and _is_thin(found, theirs), ignored)


def _reached(nodes: Sequence[ast.stmt], found: Function | ast.Lambda | None) -> list[Function | ast.Lambda]:
    """The entry point and the functions of the same statements that it calls, directly or not."""
    binding: dict[str, list[ast.stmt]] = {}
    for node in nodes:
        for name in {*_bound(node)}:
            binding.setdefault(name, []).append(node)
    reached: dict[int, Function | ast.Lambda] = {}
    waiting, seen = [found], set[str]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in reached:
            continue
        reached[id(one)] = one
        called = {node.id for node in ast.walk(one) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)} - seen
        seen |= called
        waiting += [function(binding[name], name) for name in sorted(called & binding.keys())]
    return list(reached.values())


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


def _all_ignored(one: Function | ast.Lambda, calls: Sequence[ast.Call]) -> bool:
    """Whether every call is a statement of its own or assigns its result to names that are never read."""
    wanted, ignored = {id(call) for call in calls}, 0
    read = {n.id for n in ast.walk(one) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    for node in ast.walk(one):
        value = getattr(node, "value", None)
        if isinstance(value, ast.Await):
            value = value.value
        if id(value) not in wanted:
            continue
        if isinstance(node, ast.Expr):
            ignored += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [inner for target in targets for inner in ast.walk(target) if isinstance(inner, ast.expr)]
            # any other target stores the result in an object or a container
            plain = all(isinstance(inner, (ast.Name, ast.Tuple, ast.List, ast.Starred)) for inner in stored)
            ignored += plain and not {inner.id for inner in stored if isinstance(inner, ast.Name)} & read
    return ignored == len(wanted)


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


def is_test(statement: ast.AST, names: set[str]) -> bool:
    """Whether a statement holds an assert and uses one of `names`; `assert True` is not a test."""
    inner = list(ast.walk(statement))
    return any(isinstance(node, ast.Assert) for node in inner) and any(
        isinstance(node, ast.Name) and node.id in names for node in inner
    )


def split_checks(test: str, entry_point: str) -> tuple[str, ...]:
    """The checks of a `def check(candidate)`: one for each of its top-level statements that tests the candidate.

    Such a statement holds an assert and uses the candidate or the entry point. Each check is a separate source text: the
    statements outside `check`, the other statements of `check` before the test, and the test. A text without a test is one
    check.
    """
    tree = parse(test)
    whole = f"{test}\n\ncheck({entry_point})\n"
    found = None if tree is None else next((n for n in tree.body if isinstance(n, Function) and n.name == "check"), None)
    if tree is None or not isinstance(found, ast.FunctionDef):
        return (whole,)
    names = {entry_point, *(arg.arg for arg in _arguments(found.args))}
    setup: list[ast.stmt] = []
    checks = []
    for statement in found.body:
        if is_test(statement, names):
            only = ast.FunctionDef(found.name, found.args, [*setup, statement], [], None, None)
            parts = [only if node is found else node for node in tree.body]
            written = source_of([ast.fix_missing_locations(part) for part in parts])
            checks.append(f"{written}\ncheck({entry_point})\n" if written is not None else whole)
        else:
            setup.append(statement)
    return tuple(checks) or (whole,)


def split_lines(tests: Sequence[str], entry_point: str) -> tuple[str, ...]:
    """The checks of a list of test lines, by the same rule. A line that is not Python is a check that always fails."""
    setup: list[str] = []
    checks = []
    for line in tests:
        tree = parse(line)
        if tree is None or is_test(tree, {entry_point}):
            checks.append("\n".join([*setup, line, ""]))
        else:
            setup.append(line)
    return tuple(checks) or ("\n".join([*setup, ""]),)
