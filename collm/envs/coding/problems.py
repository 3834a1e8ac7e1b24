"""Problems for `coop_code`: the public formats of HumanEval, CoopHumanEval and MBPP, and small generated problems."""

from __future__ import annotations

import ast
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from textwrap import indent

from collm import seeds
from collm.envs.coding.programs import function, parse, source_of, split_checks, split_lines, taken
from collm.envs.data import Row, field, read_each, read_rows, split_rows
from collm.errors import EnvError
from collm.sandbox.syntax import tree_of

SHARED = {
    "x_or_y": 150, "will_it_fly": 72, "valid_date": 124, "unique_digits": 104, "unique": 34, "truncate_number": 2,
    "simplify": 144, "same_chars": 54, "right_angle_triangle": 157, "prime_length": 82, "prime_fib": 39,
    "largest_prime_factor": 59, "is_multiply_prime": 75, "is_happy": 80, "skjkasdkd": 94, "factorize": 25,
}  # fmt: skip
"""Entry points of CoopHumanEval's held-out rows 0 to 15, which are rewordings of HumanEval's problems, with their numbers in
HumanEval. Fourteen of them (all but numbers 2 and 25) are in HumanEval's train slice."""

NUM_GENERATED = {"train": 2048, "eval": 256}


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    prompt: the text that agents read. header: source of the prompt's own definitions and imports. checks: source texts, each of
    which passes if it does not raise. solution: a reference solution, or "".
    """

    name: str
    prompt: str
    header: str
    entry_point: str
    checks: tuple[str, ...]
    solution: str = ""


# --- public formats ------------------------------------------------------------------------------------------------------


def from_row(row: Row, data: str) -> Problem:
    """A problem from a row of HumanEval, CoopHumanEval or sanitized MBPP. Raises EnvError for any other row."""
    return _from_mbpp(row, data) if "test_list" in row else _from_humaneval(row, data)


def _from_humaneval(row: Row, data: str) -> Problem:
    prompt, test = field(row, ("prompt",), data), field(row, ("test",), data)
    entry_point, name = field(row, ("entry_point",), data), str(row.get("task_id", ""))
    tree = parse(prompt)
    kept = [node for node in taken(tree) if getattr(node, "name", "") != entry_point] if tree is not None else []
    solution = row.get("canonical_solution")
    whole = prompt + solution if isinstance(solution, str) else ""
    return Problem(name, prompt.strip(), source_of(kept) or "", entry_point, split_checks(test, entry_point), whole)


def _from_mbpp(row: Row, data: str) -> Problem:
    prompt, code = field(row, ("prompt", "text"), data), field(row, ("code",), data)
    tests, imports, before = row["test_list"], row.get("test_imports") or [], row.get("test_setup_code") or ""
    lists = isinstance(tests, list | tuple) and isinstance(imports, list | tuple)
    if not lists or not tests or not all(isinstance(line, str) for line in (*tests, *imports, before)):
        named = f"data={data!r}: test_list of task {row.get('task_id')}"
        raise EnvError(f"{named} must hold texts, at least one, as test_imports and test_setup_code do.")
    tree = parse(code)
    defined = (
        [] if tree is None else [node for node in taken(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    )
    called = [tree for tree in map(parse, tests) if tree is not None]
    names = {node.id for tree in called for node in ast.walk(tree) if isinstance(node, ast.Name)}
    entry = next((node for node in reversed(defined) if node.name in names), None)
    if entry is None:
        raise EnvError(f"data={data!r}: no test of task {row.get('task_id')} calls a function of its code.")
    shown = f"{prompt.strip()}\ndef {entry.name}({ast.unparse(entry.args)}):"
    before = "\n".join([*imports, *([before] if before else [])])
    checks = tuple(f"{before}\n{check}" for check in split_lines(tests, entry.name))
    return Problem(str(row.get("task_id", "")), shown, "", entry.name, checks, code)


def fixed_slice(row: Row, part: str) -> slice:
    """The rows of a public set, known by its fields, that are trained on or held out."""
    slices = {"train": slice(16, None), "eval": slice(0, 16)}  # CoopHumanEval
    if "test_list" in row:
        slices = {"train": slice(15, 65), "eval": slice(0, 15)}
    elif "canonical_solution" in row:
        slices = {"train": slice(33, 163), "eval": slice(0, 32)}
    return slices[part]


@lru_cache(maxsize=32)
def public(data: str, eval_data: str | None, split: str) -> tuple[Problem, ...]:
    """Problems of one split: the fixed slices of the public sets, or the rows `[a:b]` that a source names.

    Warns by name of held-out problems that are known to be training problems in other words.
    """
    parts = {part: _rows(data, eval_data, part) for part in (("train", "eval") if eval_data is not None else (split,))}
    names = [{str(row.get("entry_point")) for row in rows} for rows in parts.values()]
    both = sorted(names[0] & names[-1] & {*SHARED}) if eval_data is not None else []
    if both:
        warnings.warn(
            f"{len(both)} held-out problems of {eval_data!r} are problems of the training data {data!r} in other words: "
            f"{', '.join(both)}. Leave them out of one of the two before you report a score.",
            stacklevel=2,
        )
    source = eval_data if split == "eval" and eval_data is not None else data
    return tuple(read_each(parts[split], lambda row: from_row(row, source), source))


def _rows(data: str, eval_data: str | None, part: str) -> Sequence[Row]:
    source = eval_data if part == "eval" and eval_data is not None else data
    if source.endswith("]"):  # rows of the user's own choice
        return split_rows(data, eval_data, part)
    rows = read_rows(source)
    rows = rows[fixed_slice(rows[0], part)] if rows else rows
    if not rows:
        raise EnvError(f"data={source!r} has no row for the split {part!r}; name rows, as in 'file.jsonl[0:20]'.")
    return rows


# --- answers that solve a problem ---------------------------------------------------------------------------------------


def worked(problem: Problem, helpers: Sequence[str], main: str) -> dict[str, str]:
    """Answers made from the reference solution, one per agent; {} if the problem has none.

    If the solution begins by changing its only argument, each helper does this step and main the rest; otherwise each helper
    holds the whole solution, and main returns the first one's result.
    """
    tree = parse(problem.solution)
    found = function(taken(tree), problem.entry_point) if tree is not None else None
    if tree is None or not isinstance(found, ast.FunctionDef):
        return {}
    if not helpers:
        return {main: problem.solution.strip()}
    body = found.body[1:] if ast.get_docstring(found) is not None else found.body
    step, rest = body[0], body[1:]
    passed = ", ".join(_passed(found.args))
    head = f"def {{}}({ast.unparse(found.args)}):"
    calls = [f"    others = [{', '.join(f'{helper}({passed})' for helper in helpers[1:])}]"] if helpers[1:] else []
    if (
        isinstance(step, ast.Assign)
        and [*map(ast.unparse, step.targets)] == [passed]
        and rest
        and isinstance(rest[-1], ast.Return)
    ):
        answers = {helper: f"{head.format(helper)}\n    return {ast.unparse(step.value)}" for helper in helpers}
        steps = [f"{passed} = {helpers[0]}({passed})", *map(ast.unparse, rest[:-1])]
        result = ast.unparse(rest[-1]).removeprefix("return ")
    else:
        answers = {helper: _renamed(problem, helper) for helper in helpers}
        steps, result = [f"found = {helpers[0]}({passed})"], "found"
    lines = [head.format(problem.entry_point), *calls, *(indent(step, "    ") for step in steps)]
    return {**answers, main: "\n".join([*lines, f"    result = {result}", "    return result"])}


def _passed(arguments: ast.arguments) -> list[str]:
    """The arguments as a call passes them on."""
    named = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args)]
    named += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    named += [f"{arg.arg}={arg.arg}" for arg in arguments.kwonlyargs]
    return [*named, *([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])]


def _renamed(problem: Problem, name: str) -> str:
    """The reference solution with its function under another name, without comments."""
    tree = tree_of(problem.solution)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == problem.entry_point:
            node.name = name
        if isinstance(node, ast.Name) and node.id == problem.entry_point:
            node.id = name
    return ast.unparse(tree)


# --- problems of our own -------------------------------------------------------------------------------------------------

Numbers = list[int]
STEPS: dict[str, tuple[str, str, Callable[[Numbers, int], Numbers]]] = {
    "even": ("keep the even numbers", "[x for x in xs if x % 2 == 0]", lambda xs, k: [x for x in xs if x % 2 == 0]),
    "odd": ("keep the odd numbers", "[x for x in xs if x % 2 == 1]", lambda xs, k: [x for x in xs if x % 2 == 1]),
    "above": ("keep the numbers above {k}", "[x for x in xs if x > {k}]", lambda xs, k: [x for x in xs if x > k]),
    "below": ("keep the numbers below {k}", "[x for x in xs if x < {k}]", lambda xs, k: [x for x in xs if x < k]),
    "double": ("double each number", "[2 * x for x in xs]", lambda xs, k: [2 * x for x in xs]),
    "square": ("square each number", "[x * x for x in xs]", lambda xs, k: [x * x for x in xs]),
    "add": ("add {k} to each number", "[x + {k} for x in xs]", lambda xs, k: [x + k for x in xs]),
    "times": ("multiply each number by {k}", "[{k} * x for x in xs]", lambda xs, k: [k * x for x in xs]),
    "sorted": ("sort the numbers", "sorted(xs)", lambda xs, k: sorted(xs)),
    "reverse": ("reverse the numbers", "xs[::-1]", lambda xs, k: xs[::-1]),
    "unique": ("keep each number once, sorted", "sorted(set(xs))", lambda xs, k: sorted(set(xs))),
    "first": ("keep the first {k} numbers", "xs[:{k}]", lambda xs, k: xs[:k]),
}
"""Name -> what is asked, a solution, and what it does; {k} is a whole number."""

ENDS: dict[str, tuple[str, str, Callable[[Numbers], int]]] = {
    "sum": ("the sum", "sum(xs)", sum),
    "count": ("how many are left", "len(xs)", len),
    "largest": ("the largest, or 0", "max(xs, default=0)", lambda xs: max(xs, default=0)),
    "smallest": ("the smallest, or 0", "min(xs, default=0)", lambda xs: min(xs, default=0)),
    "last": ("the last, or 0", "xs[-1] if xs else 0", lambda xs: xs[-1] if xs else 0),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The parts of a generated problem: one or two steps with their numbers, and an end."""

    steps: tuple[tuple[str, int], ...]
    end: str

    @property
    def entry_point(self) -> str:
        return "_".join([*(f"{name}{k}" if "{k}" in STEPS[name][0] else name for name, k in self.steps), self.end])

    def source(self, step: int) -> str:
        """The expression of one step over `xs`."""
        name, k = self.steps[step]
        return STEPS[name][1].format(k=k)

    def __call__(self, xs: Numbers) -> int:
        for name, k in self.steps:
            xs = STEPS[name][2](xs, k)
        return ENDS[self.end][2](xs)


def draw(rng: random.Random) -> Recipe:
    names = rng.sample(sorted(STEPS), rng.choice((1, 2, 2, 2)))
    return Recipe(tuple((name, rng.randint(2, 5)) for name in names), rng.choice(sorted(ENDS)))


def part_of(recipe: Recipe) -> str:
    """The part of a problem, a function of the problem itself: an eighth is held out, an eighth reserved for pre-training."""
    drawn = seeds.derive("coop_code", recipe.entry_point) % 8
    return "eval" if drawn == 0 else "pretraining" if drawn == 1 else "train"


@lru_cache(maxsize=4096)
def generated(part: str, number: int) -> Problem:
    """Problem number `number` of a part: the first problem of this number's random stream that belongs to the part."""
    rng = seeds.stream("coop_code", part, number)
    recipe = draw(rng)
    while part_of(recipe) != part:
        recipe = draw(rng)
    return problem_of(recipe, rng)


def problem_of(recipe: Recipe, rng: random.Random) -> Problem:
    """The problem of a recipe, with four checks on lists of up to six numbers, one of them empty or of one number."""
    name = recipe.entry_point
    asked = ", then ".join(STEPS[step][0].format(k=k) for step, k in recipe.steps)
    prompt = f'def {name}(xs):\n    """Of the numbers xs, {asked}. Return {ENDS[recipe.end][0]}."""'
    lists: list[Numbers] = [[rng.randint(0, 9) for _ in range(length)] for length in (rng.randint(0, 1), 4, 5, 6)]
    checks = tuple(f"assert {name}({xs}) == {recipe(list(xs))}\n" for xs in lists)
    lines = [f"    xs = {recipe.source(step)}" for step in range(len(recipe.steps))]
    solution = "\n".join([f"def {name}(xs):", *lines, f"    return {ENDS[recipe.end][1]}\n"])
    return Problem(f"{part_of(recipe)}-{name}", prompt, "", name, checks, solution)
