"""coop_code: every part of the reward by hand, the public problems' reference solutions, what programs say of themselves."""

from __future__ import annotations

import ast
import json
import random
import shutil
import textwrap
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from places import DATA, needs
from worlds import cpu_seconds_at_most

from collm import check_env, make
from collm.envs.coding import problems
from collm.envs.coding.canaries import canary_of, changed
from collm.envs.coding.coop_code import CoopCode
from collm.envs.coding.problems import SHARED, Problem, from_row, generated
from collm.envs.coding.programs import function, parse, read, returns_something, split_checks, taken, use_of
from collm.envs.data import read_rows
from collm.errors import ConfigError, EnvError
from collm.sandbox import Job, judge
from collm.tiny.workshop import programs

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
TESTS = ("assert twice(1) == 2\n", "assert twice(3) == 6\n", "assert twice(-1) == -2\n", "assert twice(0) == 0\n")
TWICE = Problem("twice", 'def twice(x):\n    """Return 2 x."""', "", "twice", TESTS, "def twice(x):\n    return 2 * x\n")

AUX = "def aux(x):\n    return x + x"
ALONE = "def twice(x):\n    return 2 * x"
WORK = "def twice(x):\n    y = aux(x)\n    z = y + 0\n    return z"


def play(main: str, aux: str | None = None, problem: Problem = TWICE, **options: Any) -> tuple[dict[str, float], Any]:
    """Reward parts of one turn, and the environment after it."""
    env = CoopCode(wording="terse", agents=1 if aux is None else 2, **options)
    env.problems, env.num_tasks = (problem,), 1
    env.reset(seed=0, options={"task": 0})
    answers = {"main": main} | ({} if aux is None else {"aux": aux})
    observations, rewards, _, _, infos = env.step(answers)
    assert rewards["main"] == pytest.approx(infos["main"]["raw_reward"] + env.shift)
    env.said, env.metrics = observations, infos["main"]["metrics"]
    return infos["main"]["reward_parts"], env


# --- the reward, line by line --------------------------------------------------------------------------------------------

FULL = {"helpers": 0.4, "entry": 0.6, "parse": 0.5, "tests": 1.0, "calls": 0.5, "work": 1.0, "ignored": 0.0}


@needs_sandbox
@pytest.mark.parametrize(
    ("main", "aux", "changes", "total"),
    [
        (WORK, AUX, {}, 4.0),
        (f"Here it is:\n```python\n{WORK}\n```\nDone.", f"```\n{AUX}\n```", {}, 4.0),
        (ALONE, AUX, {"calls": 0.0, "work": 0.0}, 2.5),  # never calls aux
        ("def twice(x):\n    return aux(x)", AUX, {"work": 0.0}, 3.0),  # thin: one return
        ('def twice(x):\n    "Doc."\n    return aux(x)', AUX, {"work": 0.0}, 3.0),
        ("def twice(x):\n    y = aux(x)\n    return y", AUX, {"work": 0.0}, 3.0),  # thin: one assignment, then return
        ("twice = lambda x: aux(x)", AUX, {"work": 0.0}, 3.0),
        ("def twice(x):\n    aux(x)\n    y = x\n    return y + y", AUX, {"ignored": -0.5}, 3.5),
        ("def twice(x):\n    _ = aux(x)\n    y = x\n    return y + y", AUX, {"ignored": -0.5}, 3.5),
        # aux missing, without a value, or of another name
        (ALONE, "def helper(x):\n    return x", {"helpers": 0.0, "calls": 0.0, "work": 0.0}, 2.1),
        (ALONE, "def aux(x):\n    print(x)", {"helpers": 0.0, "calls": 0.0, "work": 0.0}, 2.1),
        (ALONE, "def aux(x):\n    return None", {"helpers": 0.0, "calls": 0.0, "work": 0.0}, 2.1),
        (ALONE, "aux = lambda x: x", {"calls": 0.0, "work": 0.0}, 2.5),
        (ALONE, "class aux:\n    pass", {"helpers": 0.0, "calls": 0.0, "work": 0.0}, 2.1),
        # main's own aux is not the team-mate's
        (f"def aux(x):\n    return x + x\n{WORK}", "def aux(x):\n    return 0", {"calls": 0.0, "work": 0.0}, 2.5),
        # half of the tests; none of them
        ("def twice(x):\n    y = aux(x)\n    z = abs(y)\n    return z if x != 3 else 0", AUX, {"tests": 0.5}, 3.5),
    ],
)
def test_a_program_earns_its_parts(main, aux, changes, total):
    parts, env = play(main, aux)
    assert parts == pytest.approx({**FULL, **changes})
    assert sum(parts.values()) == pytest.approx(total)
    assert env.metrics["rejected"] == (parts["helpers"] == 0 and "def aux" not in aux)


@needs_sandbox
def test_the_sum_ends_where_a_part_is_missing():
    assert play("def other(x):\n    return x", AUX)[0] == {"helpers": 0.4}
    assert play("def twice(x):\n    pass", AUX)[0] == {"helpers": 0.4}
    assert play("twice = 3", AUX)[0] == {"helpers": 0.4}
    assert play(ALONE, "def aux(x) return x")[0] == {"helpers": 0.0, "entry": 0.6}
    assert play("def twice(x:\n    return x", AUX)[0] == {"helpers": 0.4}
    assert play("def twice(x):\n    return 'no'", AUX)[0] == {
        "helpers": 0.4, "entry": 0.6, "parse": 0.5, "tests": 0.0
    }  # fmt: skip


@pytest.mark.parametrize("value", [None, True, 0, 1.5, 1e300, float("inf"), "", b"", [], (), {1}, {}, [0], 1j, ...])
def test_a_changed_value_differs(value):
    assert changed(value) != value


@pytest.mark.parametrize(
    ("check", "canary"),
    [
        ("assert f(1) == 2\n", "assert f(1) == 3"),
        ("assert [2] == f(1), 'why'\n", "assert [2, 1] == f(1), 'why'"),
        ("def check(c):\n    assert c(1) == -1\ncheck(f)\n", "def check(c):\n    assert c(1) == 0\ncheck(f)"),
        ("assert f(1)\n", None),
        ("assert f(1) != 2\n", None),
        ("assert f(1) == f(2)\n", None),
        ("assert 1 == 1\n", None),
        ("assert f(1) == 1 or f(1) == 2\n", None),
        ("for x in ():\n    assert f(x) == 2\n", None),
        ("not python", None),
        ("", None),
    ],
)
def test_a_canary_changes_the_expected_literal(check, canary):
    assert canary_of(check) == canary


@needs_sandbox
@pytest.mark.parametrize(
    ("main", "needed"),
    [
        (WORK, 1.0),
        ("def twice(x):\n    y = aux(x)\n    z = y if y is None else 2 * x\n    return z", 0.0),  # a fake call
        ("def twice(x):\n    aux(x)\n    y = x\n    return y + y", 0.0),
        (ALONE, 0.0),
    ],
)
def test_needed_tells_a_fake_call(main, needed):
    parts, env = play(main, AUX)
    assert env.metrics["needed"] == needed
    assert parts["tests"] == 1.0
    guarded, _ = play(main, AUX, reward="guarded")
    assert guarded == {**parts, "calls": parts["calls"] * needed, "work": parts["work"] * needed}
    assert env.metrics["forged"] == env.metrics["not_checkable"] == 0
    assert env.diagnostics <= env.metrics.keys()


@needs_sandbox
def test_one_agent_alone_can_earn_2_1():
    parts, env = play(ALONE)
    assert parts == {"entry": 0.6, "parse": 0.5, "tests": 1.0}
    assert (env.shift, env.stop_above, env.max_reward) == (-2.1, 2.0, 2.1)
    assert not env.agents  # above 2.0


@needs_sandbox
def test_helpers_share_their_parts():
    env = CoopCode(wording="terse", agents=3)
    env.problems, env.num_tasks = (TWICE,), 1
    env.reset(seed=0, options={"task": 0})
    answers = {"aux": AUX, "aux_2": "def aux_2(x):\n    return x", "main": WORK}
    *_, infos = env.step(answers)
    assert infos["main"]["reward_parts"] == pytest.approx({**FULL, "calls": 0.25})
    env.reset(seed=0, options={"task": 0})
    *_, infos = env.step({**answers, "aux_2": "?"})
    assert infos["main"]["reward_parts"] == pytest.approx({"helpers": 0.2, "entry": 0.6})


@needs_sandbox
def test_imports_assignments_and_the_prompts_own_functions_are_kept():
    problem = Problem("p", "", "from math import pi\n\ndef base():\n    return 2", "twice", TESTS)
    parts, _ = play(
        "import math\nK: int = 1\nK += 1\n"
        "def twice(x):\n    y = aux(x)\n    z = K * base() // base()\n    return y * z // 2 * math.floor(pi) // 3",
        "from functools import partial\nBASE = 2\n@partial\ndef aux(x):\n    return BASE * x",
        problem,
    )
    assert sum(parts.values()) == pytest.approx(4.0)


@needs_sandbox
def test_what_runs_at_the_top_level_is_left_out():
    parts, _ = play(f"{WORK}\nprint(twice(1))\nraise SystemExit", f"{AUX}\nfor i in range(3):\n    aux = i")
    assert sum(parts.values()) == pytest.approx(4.0)


# --- feedback ------------------------------------------------------------------------------------------------------------


@needs_sandbox
def test_feedback_tells_levels_and_kinds_of_errors_but_no_words_of_the_others():
    _, env = play("def twice(x):\n    return aux(x)", "def aux(x):\n    raise KeyError('secret')\n    return 1")
    assert "Tests passed: 0 of 4. A test ended with KeyError." in env.said["main"]
    assert "secret" not in "".join(env.said.values())
    _, env = play(
        "def twice(x):\n    return aux(x)", "class secret(Exception):\n    pass\ndef aux(x):\n    raise secret\n    return 1"
    )
    assert "A test ended with an error." in env.said["main"]
    _, env = play("def twice(x):\n    return aux(x)", AUX)
    assert "You only pass the call on" in env.said["main"]
    assert "You only" not in env.said["aux"]
    _, env = play(ALONE, AUX)
    assert "You do not call aux." in env.said["main"]
    _, env = play("nothing", "nothing")
    assert env.said["aux"].startswith("Helper functions: missing. twice: missing.")
    _, env = play(ALONE, AUX, feedback="plain")
    assert env.said["main"] == "Revise your function. Answer Python code only."


# --- what programs say of themselves -------------------------------------------------------------------------------------


def nodes(source: str) -> list[ast.stmt]:
    tree = parse(source)
    assert tree is not None
    return taken(tree)


@pytest.mark.parametrize(
    ("source", "something"),
    [
        ("def f():\n    return 1", True),
        ("async def f():\n    return 1", True),
        ("@staticmethod\ndef f():\n    return 1", True),
        ("def f():\n    yield 1", True),
        ("def f():\n    if x:\n        return 1", True),
        ("f = lambda: 1", True),
        ("def f():\n    return", False),
        ("def f():\n    def g():\n        return 1", False),
        ("def f():\n    g = lambda: 1", False),
        ("def f():\n    return 1\nclass f:\n    pass", False),
        ("def f():\n    return 1\nf = 2", False),
        ("g = 1", False),
    ],
)
def test_what_returns_something(source, something):
    assert returns_something(function(nodes(source), "f")) is something


@pytest.mark.parametrize(
    ("source", "use"),
    [
        ("def f(x):\n    y = x\n    return g(aux(y))", (True, False, False)),
        ("def f(x):\n    return h(x) + 1\ndef h(x):\n    return aux(x)", (True, False, False)),  # through a function of its own
        ("def f(x):\n    return 1\ndef h(x):\n    return aux(x)", (False, False, False)),  # h is never reached
        ("def f(x, aux):\n    y = aux(x)\n    z = y\n    return z", (False, False, False)),  # a parameter
        ("def f(x):\n    aux = abs\n    y = aux(x)\n    return y", (False, False, False)),  # a local
        ("from m import aux\ndef f(x):\n    y = 1\n    z = aux(x)\n    return z", (False, False, False)),
        ("def f(x):\n    return [aux(i) for i in x]", (True, True, False)),
        ("def f(x):\n    self.y = aux(x)\n    z = 1\n    return z", (True, False, False)),  # kept in an object
        ("def f(x):\n    a, b = aux(x)\n    c = 1\n    return a", (True, False, False)),
        ("def f(x):\n    a, b = aux(x)\n    c = 1\n    return c", (True, False, True)),
        ("def f(x):\n    aux(x)\n    y = aux(x)\n    return y", (True, False, False)),  # one of two is used
        ("def f(x):\n    pass", (False, True, False)),
        ("def f(x):\n    'doc'", (False, True, False)),
        ("def f(f):\n    return f.aux(1)", (False, False, False)),  # a method
    ],
)
def test_how_a_program_uses_a_function(source, use):
    found = use_of(nodes(source), "f", ["aux"])
    assert (found.calls, found.thin, found.ignored) == use


def test_code_stands_in_fences_or_is_all_there_is():
    for answer, code in (
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\ny = 2"),
        ("```py\nx = 1", "x = 1"),
    ):
        tree = read(answer)
        assert tree is not None
        assert ast.unparse(tree) == code
    assert read("x" * 20_001) is None
    assert read("I cannot help, from what I know.") is None


GOOD = {"aux": AUX, "main": WORK}
SHAPES = {
    "clean": "{code}",
    "prose": "Here is my function:\n\n{code}\n\nIt doubles x, doesn't it?",
    "fence": "Sure!\n```python\n{code}\n```\nThat's all.",
    "unclosed fence": "Sure!\n```python\n{code}",
    "only closed": "{code}\n```\nDone.",
    "cut example": "{code}\n\nprint(twice([1, 2",
    "cut example in a fence": "```python\n{code}\n\nfor x in [1, 2]:\n    print(\n```",
    "second fence": "```python\n{code}\n```\nExample:\n```\n>>> twice(1)\n2\n```",
    "second fence cut": "```python\n{code}\n```\nExample:\n```python\nprint(twice(",
    "indented": "{indented}",
    "indented fence": "1. Code:\n    ```python\n{indented}\n    ```\n2. Done.",
    "indented with prose": "Answer:\n\n{indented}\n\nThat is it.",
    "windows": "Sure:\r\n```python\r\n{code}\r\n```\r\n",
}


@needs_sandbox
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_good_answer_earns_the_same_in_any_shape(shape):
    said = {
        agent: shape.format(code=code.strip(), indented=textwrap.indent(code.strip(), "    ")) for agent, code in GOOD.items()
    }
    assert sum(play(said["main"], said["aux"])[0].values()) == pytest.approx(4.0)


HOSTILE = [
    "def f(xs):\n" + "    aux();" * 1_900,
    "def f(xs):\n    " + "aux();" * 3_200 + "\n    return 1",
    "aux();" * 3_300,
    "```" * 6_600,
    "```\n" * 5_000,
    "```py\nx\n" * 2_000,
    "```" + " " * 19_000,
    "@a\n" * 6_600,
    "def f():\n" * 2_200,
    "from x\n" * 2_800,
    "import (\n" * 2_000,
    "def f(x): return g(\n" * 950,
    "x = 1\n" * 3_000 + "(",
    "".join(f"def f{i}(x): return f{i + 1}(x)\n" for i in range(600)),
    "try:\n  pass\n" * 1_500,
    ("'" * 3) * 6_001,
    "a = " * 4_900 + "1",
    "if 1:\n  x\nelse\n" * 1_100,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_answer_is_read_and_walked_in_no_time(text):
    with cpu_seconds_at_most(2):
        tree = read(text)
        found = [] if tree is None else taken(tree)
        use_of(found, "f", ["aux"])
        returns_something(function(found, "f"))


def test_a_check_is_split_into_its_asserts_with_the_set_up_before_them():
    head = "M = {}\ndef check(candidate):\n    a = 1\n"
    loop = "    b = 2\n    for i in (a, b):\n        assert candidate(i)\n"
    test = f"{head}    assert candidate(a)\n{loop}    assert True\n    assert a\n"
    one, two = split_checks(test, "f")
    assert one == "M = {}\n\ndef check(candidate):\n    a = 1\n    assert candidate(a)\ncheck(f)\n"
    assert two == head.replace("{}\n", "{}\n\n") + loop + "check(f)\n"
    assert split_checks("def check(c):\n    c(1)\n", "f") == ("def check(c):\n    c(1)\n\n\ncheck(f)\n",)
    assert len(split_checks("not python", "f")) == 1


# --- data ----------------------------------------------------------------------------------------------------------------


@needs_sandbox
@needs("humaneval")
@pytest.mark.parametrize(
    ("source", "count"), [("humaneval/HumanEval.jsonl.gz", 120), ("mbpp/sanitized-mbpp.json", 300)], ids=["humaneval", "mbpp"]
)
def test_reference_solutions_earn_the_full_test_part_and_with_a_working_aux_everything(source, count):
    found = [from_row(row, source) for row in read_rows(str(DATA / source))]
    assert len(found) == count
    jobs = [Job("\n\n".join([p.header, p.solution]), p.checks, entries=(p.entry_point,), setup=p.header) for p in found]
    assert all(verdict.passed for verdicts in judge(jobs) for verdict in verdicts)
    canaries = [replace(job, checks=tuple(c for check in job.checks if (c := canary_of(check)) is not None)) for job in jobs]
    assert sum(len(job.checks) for job in canaries) > 0.6 * sum(len(job.checks) for job in jobs)
    assert not any(verdict.passed for verdicts in judge(canaries) for verdict in verdicts)
    for problem in found[:: len(found) // 12]:  # the whole way through the world, the solution moved into aux
        name = problem.entry_point
        tree = parse(problem.solution)
        assert tree is not None
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name == name:
                node.name = f"{name}_"
            elif isinstance(node, ast.Name) and node.id == name:
                node.id = f"{name}_"
        moved = f"{ast.unparse(tree)}\n\ndef aux(*args, **named):\n    return {name}_(*args, **named)\n"
        main = f"def {name}(*args, **named):\n    found = aux(*args, **named)\n    kept = [found]\n    return kept[0]\n"
        parts, _ = play(main, moved, problem)
        assert sum(parts.values()) == pytest.approx(4.0), problem.name


TRUTHY = {"HumanEval/33", "HumanEval/52", "HumanEval/56", "HumanEval/61"}
"""Problems whose own asserts take any truthy value, or the argument itself."""


@pytest.mark.slow
@needs_sandbox
@needs("humaneval")
def test_nonsense_earns_at_most_1_6_on_every_public_problem_whose_tests_ask_for_a_value():
    for row in read_rows(str(DATA / "humaneval/HumanEval.jsonl.gz")):
        problem = from_row(row, "HumanEval")
        name = problem.entry_point
        main = f"def {name}(*args):\n    aux(args)\n    kept = 'nonsense'\n    return kept"
        parts, _ = play(main, "def aux(x):\n    return x", problem)
        assert sum(parts.values()) <= 1.6 or problem.name in TRUTHY, problem.name


@needs("humaneval")
def test_public_slices():
    sizes = {
        "humaneval/HumanEval.jsonl.gz": (87, 32),  # [33:163] of the 120 rows here
        "coophumaneval/che_raw.json": (34, 16),
        "mbpp/sanitized-mbpp.json": (50, 15),
    }
    for source, wanted in sizes.items():
        assert (
            tuple(CoopCode(wording="terse", data=str(DATA / source), split=split).num_tasks for split in ("train", "eval"))
            == wanted
        )
    assert CoopCode(wording="terse", data=f"{DATA / 'mbpp/sanitized-mbpp.json'}[0:10]", split="eval").num_tasks == 2


def rows(folder: Path, name: str, entries: list[str], **more: str) -> str:
    test = "def check(candidate):\n    assert candidate(1) == 1\n"
    lines = [
        {"task_id": f"t/{i}", "prompt": f"def {e}(x):\n", "entry_point": e, "test": test, **more} for i, e in enumerate(entries)
    ]
    (folder / name).write_text("\n".join(map(json.dumps, lines)))
    return str(folder / name)


def test_training_on_humaneval_and_evaluating_on_coophumaneval_warns_of_fourteen_problems_by_name(tmp_path):
    numbers = {number: name for name, number in SHARED.items()}
    humaneval = rows(
        tmp_path, "he.jsonl", [numbers.get(i, f"other_{i}") for i in range(164)], canonical_solution="    return x\n"
    )
    coop = rows(tmp_path, "che.jsonl", [*SHARED, *(f"new_{i}" for i in range(20))])
    problems.public.cache_clear()
    with pytest.warns(UserWarning, match="14 held-out problems") as told:
        assert CoopCode(wording="terse", data=humaneval, eval_data=coop).num_tasks == 130
    names = str(told[0].message)
    assert all((name in names) == (33 <= number < 163) for name, number in SHARED.items())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CoopCode(wording="terse", data=humaneval)
        CoopCode(wording="terse", data=coop, eval_data=f"{coop}[20:]")


def test_rows_that_are_no_problems_are_refused(tmp_path):
    for row in (
        '{"prompt": 1}',
        '{"prompt": "p", "code": "x = 1", "test_list": ["assert f(1)"]}',
        '{"prompt": "p", "code": "", "test_list": []}',
    ):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join([row] * 40))
        with pytest.raises(EnvError, match=r"rows\.jsonl"):
            CoopCode(wording="terse", data=f"{path}[0:20]")


def test_bad_options_are_refused():
    for options in ({"agents": 0}, {"agents": ["a b", "main"]}, {"seconds": 0.0}, {"eval_data": "x.json"}, {"feedback": "all"}):
        with pytest.raises(ConfigError):
            make("coop_code", **options)


# --- problems of our own -------------------------------------------------------------------------------------------------


@needs_sandbox
def test_generated_problems_are_solved_by_their_solutions_and_parts_never_meet():
    drawn = {part: [generated(part, number) for number in range(150)] for part in ("train", "eval", "pretraining")}
    names = {part: {problem.entry_point for problem in found} for part, found in drawn.items()}
    assert not names["train"] & names["eval"]
    assert not names["train"] & names["pretraining"]
    assert len(names["eval"]) >= 60
    found = drawn["eval"]
    assert all(v.passed for vs in judge([Job(problem.solution, problem.checks) for problem in found]) for v in vs)
    assert generated("train", 3) is generated("train", 3)


@needs_sandbox
@pytest.mark.parametrize("agents", [1, 2, 3])
def test_the_contract(agents):
    assert check_env(CoopCode(wording="terse", agents=agents))


@needs_sandbox
def test_poor_programmers_earn_something_and_vary():
    totals = []
    for number in range(60):
        rng = random.Random(number)
        recipe = problems.draw(rng)
        problem = problems.problem_of(recipe, rng)
        env = CoopCode(wording="terse")
        parts, _ = play(*(programs.write(env, recipe, agent, rng) for agent in ("main", "aux")), problem)
        totals.append(sum(parts.values()))
    assert 0.4 < sum(totals) / len(totals) < 2.6
    assert len({round(total, 2) for total in totals}) > 8
