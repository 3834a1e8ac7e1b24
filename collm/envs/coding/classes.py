"""Classes as text: reads a row of ClassEval's format into a `ClassTask`, and merges answers into one class.

Everything works on syntax trees; no program is run here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from collm.envs.coding.canaries import canary_of_case
from collm.envs.coding.programs import Function, parse, read, source_of
from collm.envs.data import Row, field
from collm.errors import EnvError

_BLANK = re.compile(r"\n[ \t\r]*(?:\n[ \t\r]*)+\n")
_IMPORTS = (ast.Import, ast.ImportFrom)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_RUN_LAST = """

def _run_last(tests):
    import unittest
    for case, name in tests:
        result = unittest.TestResult()
        unittest.TestSuite([case(name)]).run(result)
    for _, trace in result.errors + result.failures:
        raise AssertionError(trace.strip().splitlines()[-1])
    assert result.testsRun == 1 and result.wasSuccessful(), "the test did not run"
    assert not result.skipped and not result.expectedFailures, "the test was skipped"


_run_last([{tests}])
"""


@dataclass(frozen=True, slots=True)
class PublicTest:
    """One method of a public unittest class. method: the method that it tests, or "" for the class as a whole."""

    case: str
    function: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.case}.{self.function}"


@dataclass(frozen=True, slots=True)
class ClassTask:
    """A class to write.

    parameters: method -> number of parameters without `self`. imports, header: the given imports and constructor. unlisted:
    methods of the skeleton that the data's methods_info lacks; they are assigned to the last agent.
    """

    name: str
    class_name: str
    skeleton: str
    parameters: Mapping[str, int]
    imports: tuple[str, ...]
    header: str
    tests: tuple[PublicTest, ...]
    test_source: str
    solution: str
    unlisted: tuple[str, ...] = ()

    @property
    def methods(self) -> list[str]:
        return list(self.parameters)

    def check(self, test: PublicTest, after: Sequence[PublicTest] = ()) -> str:
        """Source that raises unless a test passes, its `setUp` included. The tests `after` run before it and do not count."""
        return self.test_source + _run_last(test, after)

    def canary(self, test: PublicTest, after: Sequence[PublicTest] = ()) -> str | None:
        """The same check with another expected literal, or None if the test does not compare with a literal."""
        source = canary_of_case(self.test_source, test.case, test.function)
        return None if source is None else source + _run_last(test, after)


def _run_last(test: PublicTest, after: Sequence[PublicTest]) -> str:
    return _RUN_LAST.format(tests=", ".join(f"({one.case}, {one.function!r})" for one in (*after, test)))


@dataclass(slots=True)
class Answer:
    """One agent's answer: the task's methods by name, other members of the class, and statements outside the class.

    dropped: number of statements that are not definitions, assignments or imports and are left out.
    """

    methods: dict[str, list[Function]]
    members: list[ast.stmt]
    beside: list[ast.stmt]
    dropped: int = 0


def read_task(row: Row, data: str) -> ClassTask:
    """Read a row of ClassEval's public format. Raises EnvError naming what the row lacks."""
    try:
        return _read_task(json.dumps(row), data)
    except (TypeError, KeyError, AttributeError, ValueError, SyntaxError) as error:
        raise EnvError(f"data={data!r}: a row is not of ClassEval's format: {type(error).__name__}: {error}.") from error


@lru_cache(maxsize=512)
def _read_task(text: str, data: str) -> ClassTask:
    row = json.loads(text)
    infos = row["methods_info"]
    if not isinstance(infos, list) or not infos:
        raise EnvError(f"data={data!r}: a row's methods_info lists no method.")
    class_name = field(row, ["class_name"], data)
    parameters = {info["method_name"]: num_parameters(info["method_description"], info["method_name"]) for info in infos}
    skeleton = field(row, ["skeleton"], data).replace("\r\n", "\n")
    unlisted = [name for name in methods_of(skeleton, class_name) if name not in parameters and name != "__init__"]
    parameters |= {name: num_parameters(skeleton, name) for name in unlisted}
    imports = row.get("import_statement", [])
    owners = {info["test_class"]: info["method_name"] for info in infos if "test_class" in info}
    tests = tests_of(field(row, ["test"], data), owners)
    if not tests:
        raise EnvError(f"data={data!r}: a row's test holds no method of a unittest class.")
    return ClassTask(
        name=field(row, ["task_id"], data),
        class_name=class_name,
        skeleton=_BLANK.sub("\n\n", skeleton).strip(),
        parameters=parameters,
        imports=tuple([imports] if isinstance(imports, str) else imports),
        header=str(row.get("class_constructor", "")),
        tests=tests,
        test_source=field(row, ["test"], data),
        solution=str(row.get("solution_code", "")),
        unlisted=tuple(unlisted),
    )


def methods_of(skeleton: str, class_name: str) -> list[str]:
    """Names of the methods in a class's skeleton, in order; empty if the skeleton is not Python."""
    for node in _statements(skeleton):
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return list(dict.fromkeys(member.name for member in node.body if isinstance(member, Function)))
    return []


def methods_in(source: str, class_name: str) -> dict[str, str]:
    """The source of every method of a class by name, without docstrings; {} if the source does not hold the class."""
    found: dict[str, str] = {}
    for node in _statements(source):
        for method in node.body if isinstance(node, ast.ClassDef) and node.name == class_name else ():
            if isinstance(method, Function):
                if ast.get_docstring(method) is not None and len(method.body) > 1:
                    del method.body[0]
                found[method.name] = "\n".join(filter(None, (found.get(method.name), ast.unparse(method))))
    return found


def num_parameters(description: str, name: str) -> int:
    """Number of parameters of the function that a description begins with, without `self` and `cls`.

    Only the function's head is read, since a description's docstring need not be valid Python.
    Example: num_parameters("def f(self, x): ...", "f") == 1
    """
    start = description.find(f"def {name}")
    if start < 0:
        raise EnvError(f"the description of the method {name!r} has no line 'def {name}(...)'.")
    head = description[start:]
    for end in (found.start() for found in re.finditer(":", head)):
        tree = parse(head[:end] + ": pass")
        if tree is not None and isinstance(tree.body[0], Function):
            found = tree.body[0].args
            names = [arg.arg for arg in (*found.posonlyargs, *found.args)]
            own = bool(names) and names[0] in ("self", "cls")
            return len(names) - own + len(found.kwonlyargs) + (found.vararg is not None) + (found.kwarg is not None)
    raise EnvError(f"the head of the method {name!r} cannot be read.")


def tests_of(source: str, owners: Mapping[str, str]) -> tuple[PublicTest, ...]:
    """Every test method of every class of a unittest module, in order."""
    tree = parse(source)
    cases = {node.name: node for node in (tree.body if tree else []) if isinstance(node, ast.ClassDef)}
    found = []
    for case in cases.values():
        names = [node.name for node in case.body if isinstance(node, Function) and node.name.startswith("test")]
        found += [PublicTest(case.name, name, owners.get(case.name, "")) for name in dict.fromkeys(names)]
    return tuple(found)


def shares(task: ClassTask, agents: Sequence[str], share: str) -> dict[str, list[str]]:
    """The methods assigned to each agent.

    With "parameters" the first of two agents writes the methods with exactly one parameter and the second the rest, so that one
    of them may have none. With "round_robin", or another number of agents, methods are assigned in turn. Methods that
    methods_info does not list are assigned to the last agent.
    """
    if share == "parameters" and len(agents) == 2:
        first, second = agents
        one = [name for name, count in task.parameters.items() if count == 1 and name not in task.unlisted]
        return {first: one, second: [name for name in task.methods if name not in one]}
    listed = [name for name in task.methods if name not in task.unlisted]
    found = {agent: listed[place :: len(agents)] for place, agent in enumerate(agents)}
    return {**found, agents[-1]: [*found[agents[-1]], *task.unlisted]}


def read_answer(text: str, task: ClassTask) -> Answer | None:
    """The definitions in an answer, or None if it does not hold Python.

    The methods may be bare, indented or inside the class. Text around them is ignored as in `programs.read`.
    """
    tree = read(text)
    if tree is None:
        return None
    answer = Answer({}, [], [])
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == task.class_name:
            for member in node.body:
                _sort_in(member, task, answer, inside=True)
        else:
            _sort_in(node, task, answer, inside=False)
    return answer


def _sort_in(node: ast.stmt, task: ClassTask, answer: Answer, *, inside: bool) -> None:
    """Add one statement to `answer`. Docstrings, `pass` and the given constructor are left out and not counted."""
    if isinstance(node, Function) and node.name in task.parameters:
        answer.methods.setdefault(node.name, []).append(node)
    elif isinstance(node, Function) and node.name == "__init__":
        if not _has_constructor(task):
            answer.members.append(node)
    elif isinstance(node, Function):
        (answer.members if inside or _is_method(node) else answer.beside).append(node)
    elif isinstance(node, _ASSIGNMENTS) and not _names(node) & task.parameters.keys():
        (answer.members if inside else answer.beside).append(node)
    elif isinstance(node, _IMPORTS) or (isinstance(node, ast.ClassDef) and not inside):
        answer.beside.append(node)
    elif not _says_nothing(node):
        answer.dropped += 1


def _is_method(node: Function) -> bool:
    first = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)][:1]
    return first == ["self"] or any(
        isinstance(d, ast.Name) and d.id in ("staticmethod", "classmethod") for d in node.decorator_list
    )


def _names(node: ast.stmt) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _says_nothing(node: ast.stmt) -> bool:
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def is_written(functions: Sequence[Function]) -> bool:
    """Whether the last of a method's definitions has a body: more than a docstring, `pass` or `...`."""
    return bool(functions) and not all(map(_says_nothing, functions[-1].body))


def merged(task: ClassTask, answers: Mapping[str, Answer], owned: Mapping[str, Sequence[str]]) -> str | None:
    """The program: the task's imports and constructor, and each agent's own methods and additions.

    None if it cannot be written.
    """
    head = _head(task)
    body = list(head.body)
    beside: list[ast.stmt] = [node for line in task.imports for node in _statements(line)]
    for answer in answers.values():
        beside += answer.beside
        body += answer.members
    for name in task.methods:
        for agent, answer in answers.items():
            if name in owned[agent]:
                body += answer.methods.get(name, [])
    head = ast.ClassDef(head.name, head.bases, head.keywords, body or [ast.Pass()], head.decorator_list)
    future = [node for node in beside if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    first = {id(node) for node in future}
    ordered = [*future, *(node for node in beside if id(node) not in first), head]
    source = source_of(ordered)
    return source if source is not None and parse(source) is not None else None


def _statements(source: str) -> list[ast.stmt]:
    tree = parse(source)
    return tree.body if tree else []


@lru_cache(maxsize=64)
def _parsed_head(header: str, class_name: str) -> ast.ClassDef:
    """The class with only its constructor; a header without a body gives an empty class."""
    for source in (header, header.rstrip() + "\n    pass"):
        for node in _statements(source):
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                return node
    return ast.ClassDef(class_name, [], [], [ast.Pass()], [])


def _head(task: ClassTask) -> ast.ClassDef:
    return _parsed_head(task.header, task.class_name)


def _has_constructor(task: ClassTask) -> bool:
    return any(isinstance(node, Function) and node.name == "__init__" for node in _head(task).body)
