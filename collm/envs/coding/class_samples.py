"""Built-in classes, in ClassEval's own format, so that `class_eval` needs no download: a list or a number, and four methods.

Two methods have one parameter and two have none or two, so that both of two agents have work. The set of methods, their
numbers included, decides which split a class is in.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from collm import seeds
from collm.envs.data import Row

NUM_TASKS = {"train": 512, "eval": 64}


@dataclass(frozen=True, slots=True)
class Method:
    """One method of a built-in class; `{k}` stands for a number of 2..9 in the name, the rule and the body."""

    name: str
    parameters: str
    rule: str
    body: str

    def filled(self, k: int) -> Method:
        return Method(*(text.replace("{k}", str(k)) for text in (self.name, self.parameters, self.rule, self.body)))


ITEMS = (
    Method("add", "x", "Append x to items.", "self.items.append(x)"),
    Method("add{k}", "x", "Append x plus {k} to items.", "self.items.append(x + {k})"),
    Method("count", "x", "Return how many items are x.", "return self.items.count(x)"),
    Method("has", "x", "Return whether x is in items.", "return x in self.items"),
    Method("above", "x", "Return the items above x.", "return [y for y in self.items if y > x]"),
    Method("below", "x", "Return the items below x.", "return [y for y in self.items if y < x]"),
    Method("plus", "x", "Return the items, each plus x.", "return [y + x for y in self.items]"),
    Method("times", "x", "Return the items, each times x.", "return [y * x for y in self.items]"),
    Method("drop", "x", "Remove every x from items.", "self.items = [y for y in self.items if y != x]"),
    Method("total", "", "Return the sum of items.", "return sum(self.items)"),
    Method("total{k}", "", "Return the sum of items plus {k}.", "return sum(self.items) + {k}"),
    Method("times{k}", "", "Return the items, each times {k}.", "return [y * {k} for y in self.items]"),
    Method("above{k}", "", "Return the items above {k}.", "return [y for y in self.items if y > {k}]"),
    Method("size", "", "Return how many items there are.", "return len(self.items)"),
    Method("largest", "", "Return the largest item, or 0.", "return max(self.items, default=0)"),
    Method("smallest", "", "Return the smallest item, or 0.", "return min(self.items, default=0)"),
    Method("evens", "", "Return the even items.", "return [y for y in self.items if y % 2 == 0]"),
    Method("odds", "", "Return the odd items.", "return [y for y in self.items if y % 2 == 1]"),
    Method("flip", "", "Reverse items.", "self.items = self.items[::-1]"),
    Method("clear", "", "Remove all items.", "self.items = []"),
    Method("put", "i, x", "Insert x at place i of items.", "self.items.insert(i, x)"),
    Method("within", "a, b", "Return the items from a to b.", "return [y for y in self.items if a <= y <= b]"),
)
NUMBER = (
    Method("add", "x", "Add x to n.", "self.n += x"),
    Method("sub", "x", "Subtract x from n.", "self.n -= x"),
    Method("times", "x", "Multiply n by x.", "self.n *= x"),
    Method("add{k}", "x", "Add x and {k} to n.", "self.n += x + {k}"),
    Method("plus", "x", "Return n plus x.", "return self.n + x"),
    Method("minus", "x", "Return n minus x.", "return self.n - x"),
    Method("below", "x", "Return whether n is below x.", "return self.n < x"),
    Method("above", "x", "Return whether n is above x.", "return self.n > x"),
    Method("plus{k}", "x", "Return n plus x plus {k}.", "return self.n + x + {k}"),
    Method("get", "", "Return n.", "return self.n"),
    Method("double", "", "Double n.", "self.n *= 2"),
    Method("reset", "", "Set n to 0.", "self.n = 0"),
    Method("square", "", "Return n times n.", "return self.n * self.n"),
    Method("even", "", "Return whether n is even.", "return self.n % 2 == 0"),
    Method("up{k}", "", "Add {k} to n.", "self.n += {k}"),
    Method("down{k}", "", "Subtract {k} from n.", "self.n -= {k}"),
    Method("times{k}", "", "Return n times {k}.", "return self.n * {k}"),
    Method("mod{k}", "", "Return n modulo {k}.", "return self.n % {k}"),
    Method("swap", "a, b", "Add a to n and subtract b.", "self.n += a - b"),
    Method("scale", "a, b", "Set n to n times a plus b.", "self.n = self.n * a + b"),
    Method("inside", "a, b", "Return whether n lies from a to b.", "return a <= self.n <= b"),
)
KINDS = {  # what the constructor sets -> its first value, the methods, the classes' names
    "items": ("[]", ITEMS, ("Box", "Bag", "Shelf", "Cart", "Row")),
    "n": ("0", NUMBER, ("Score", "Meter", "Dial", "Tally", "Step")),
}


@dataclass(frozen=True, slots=True)
class Sample:
    """A built-in class: what its constructor sets, its name, its methods."""

    attribute: str
    class_name: str
    methods: tuple[Method, ...]

    @property
    def part(self) -> str:
        """Which split it is in: an eighth of all sets of methods is held out."""
        key = "-".join([self.attribute, *sorted(method.name for method in self.methods)])
        return "eval" if seeds.derive("class_eval", key) % 8 == 0 else "train"


def draw(rng: random.Random) -> Sample:
    attribute = rng.choice(tuple(KINDS))
    _, methods, names = KINDS[attribute]
    chosen = rng.sample([m for m in methods if _arity(m) == 1], 2) + rng.sample([m for m in methods if _arity(m) != 1], 2)
    filled = [method.filled(rng.randint(2, 9)) for method in chosen]
    if len({method.name for method in filled}) < len(filled):
        return draw(rng)
    rng.shuffle(filled)
    return Sample(attribute, rng.choice(names), tuple(filled))


@lru_cache(maxsize=2)
def sample_tasks(split: str) -> tuple[Row, ...]:
    """The classes of "train" or "eval", no two with the same set of methods."""
    rng = seeds.stream("class_eval", split)
    found: dict[tuple[Any, ...], Sample] = {}
    while len(found) < NUM_TASKS[split]:
        sample = draw(rng)
        if sample.part == split:
            found.setdefault((sample.attribute, *sorted(method.name for method in sample.methods)), sample)
    return tuple(as_row(sample, f"{split}-{number}") for number, sample in enumerate(found.values()))


def as_row(sample: Sample, name: str) -> Row:
    """The class as a row of ClassEval's format, its tests included: three for every method and one of them all."""
    first, _, _ = KINDS[sample.attribute]
    header = f"class {sample.class_name}:\n    def __init__(self):\n        self.{sample.attribute} = {first}\n"
    heads = [_head(method) for method in sample.methods]
    skeleton = header + "".join(f"    {head}\n" + f'        """{m.rule}"""\n' for head, m in zip(heads, sample.methods))
    bodies = [f"    {head}\n        {method.body}\n" for head, method in zip(heads, sample.methods)]
    solution = header + "".join(bodies)
    rng = seeds.stream("class_eval", "tests", solution)
    kind = _run(solution)[sample.class_name]
    cases = [_case(sample, [[method]] * 3, _case_name(sample, method), kind, rng) for method in sample.methods]
    cases.append(_case(sample, [list(sample.methods)], f"{sample.class_name}Test", kind, rng))
    infos = [
        {
            "method_name": method.name,
            "method_description": f'{head}\n    """{method.rule}"""',
            "test_class": _case_name(sample, method),
            "solution_code": f"{head}\n    {method.body}",
        }
        for head, method in zip(heads, sample.methods)
    ]
    return {
        "task_id": name,
        "class_name": sample.class_name,
        "skeleton": skeleton,
        "import_statement": [],
        "class_constructor": header,
        "methods_info": infos,
        "test": "import unittest\n" + "".join(cases),
        "solution_code": solution,
    }


def _arity(method: Method) -> int:
    return len(method.parameters.split(", ")) if method.parameters else 0


def _head(method: Method) -> str:
    return f"def {method.name}(self{', ' if method.parameters else ''}{method.parameters}):"


def _case_name(sample: Sample, method: Method) -> str:
    return f"{sample.class_name}Test{method.name.capitalize()}"


def _run(solution: str) -> dict[str, Any]:
    """The namespace of a solution that this file has written itself."""
    names: dict[str, Any] = {}
    exec(solution, names)
    return names


def _case(sample: Sample, plans: Sequence[Sequence[Method]], name: str, kind: Any, rng: random.Random) -> str:
    """A unittest class with one test for every plan: the calls are made in order, what they return and leave is compared."""
    lines = [f"\nclass {name}(unittest.TestCase):\n"]
    for number, plan in enumerate(plans):
        thing = kind()
        value = [rng.randint(0, 9) for _ in range(rng.randint(2, 5))] if sample.attribute == "items" else rng.randint(0, 9)
        setattr(thing, sample.attribute, value)
        lines += [f"    def test_{number}(self):\n", f"        it = {sample.class_name}()\n"]
        lines.append(f"        it.{sample.attribute} = {value!r}\n")
        for method in plan:
            arguments = sorted(rng.randint(0, 9) for _ in range(_arity(method)))
            if method.name == "put":
                arguments[0] = rng.randint(0, 2)
            call = f"it.{method.name}({', '.join(map(str, arguments))})"
            got = getattr(thing, method.name)(*arguments)
            lines.append(f"        self.assertEqual({call}, {got!r})\n")
        lines.append(f"        self.assertEqual(it.{sample.attribute}, {getattr(thing, sample.attribute)!r})\n")
    return "".join(lines)
