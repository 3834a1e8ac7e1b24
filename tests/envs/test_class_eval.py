"""class_eval: the reward by hand, the public classes' reference solutions, and answers of every kind."""

from __future__ import annotations

import ast
import json
import math
import random
import shutil
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import DATA, needs

from collm import check_env, make
from collm.envs.coding.class_eval import ClassEval
from collm.envs.coding.class_samples import NUM_TASKS, sample_tasks
from collm.envs.coding.classes import is_written, merged, num_parameters, read_answer, read_task, shares
from collm.errors import ConfigError, EnvError
from collm.tiny.workshop import classes

needs_sandbox = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
CLASSES = "classeval/ClassEval_data.json"

# Four methods: add and below have one parameter, total and put none and two. Eight tests: two of each method.
SKELETON = '''class Pile:
    """A pile of numbers."""
    def __init__(self):
        self.xs = []
    def add(self, x):
        """Append x."""
    def total(self):
        """Return the sum."""
    def below(self, x):
        """Return the numbers below x."""
    def put(self, i, x):
        """Insert x at i."""
'''
BODIES = {
    "add": "def add(self, x):\n    self.xs.append(x)\n",
    "total": "def total(self):\n    return sum(self.xs)\n",
    "below": "def below(self, x):\n    return [y for y in self.xs if y < x]\n",
    "put": "def put(self, i, x):\n    self.xs.insert(i, x)\n",
}
CALLS = {
    "add": ("it.add(4)", [1, 2, 4]),
    "total": ("it.total()", 3),
    "below": ("it.below(2)", [1]),
    "put": ("it.put(0, 7)", [7, 1, 2]),
}


def _case(name: str) -> str:
    call, wanted = CALLS[name]
    got = "it.xs" if name in ("add", "put") else "got"
    body = f"        it = self.it\n        got = {call}\n        self.assertEqual({got}, {wanted})\n"
    setup = "    def setUp(self):\n        self.it = Pile()\n        self.it.xs = [1, 2]\n"
    return f"class PileTest{name.title()}(unittest.TestCase):\n{setup}" + "".join(
        f"    def test_{name}_{number}(self):\n{body}" for number in (1, 2)
    )


ROW = {
    "task_id": "Pile",
    "class_name": "Pile",
    "skeleton": SKELETON,
    "import_statement": ["import math"],
    "class_constructor": "class Pile: \n    def __init__(self):\n        self.xs = []\n\n",
    "methods_info": [
        {"method_name": name, "method_description": BODIES[name], "test_class": f"PileTest{name.title()}"} for name in BODIES
    ],
    "test": "import unittest\n" + "".join(map(_case, BODIES)),
    "solution_code": SKELETON,
}
ONE, REST = BODIES["add"] + BODIES["below"], BODIES["total"] + BODIES["put"]
TASK = read_task(ROW, "here")


def start(row: dict[str, Any] = ROW, **options: Any) -> ClassEval:
    env = ClassEval(wording="terse", **options)
    env.rows, env.num_tasks = (row,), 1
    env.reset(seed=0, options={"task": 0})
    return env


def turn(env: ClassEval, *answers: str) -> tuple[dict[str, str], dict[str, Any]]:
    """One turn: (what is read next, the info)."""
    observations, rewards, _, _, infos = env.step(dict(zip(env.possible_agents, answers, strict=True)))
    info = infos["agent_0"]
    assert set(rewards.values()) == {info["raw_reward"] - 6}
    assert info["raw_reward"] == pytest.approx(math.fsum(info["reward_parts"].values()))
    return observations, info


def judge(*answers: str, **options: Any) -> tuple[tuple[float, float, float], dict[str, float]]:
    """Points for methods, tests and duplicates, and the metrics."""
    _, info = turn(start(agents=len(answers), **options), *answers)
    parts = info["reward_parts"]
    return (parts["methods"], parts["tests"], parts["duplicates"]), info["metrics"]


# --- the reward, line by line --------------------------------------------------------------------------------------------


@needs_sandbox
def test_a_right_class_earns_6_and_ends_at_once():
    env = start()
    _, info = turn(env, ONE, REST)
    assert info["raw_reward"] == 6.0
    assert info["reward_parts"] == {"methods": 2.0, "tests": 4.0, "duplicates": 0.0}
    ones, none = (
        ("tests_passed", "methods_written", "parsed"),
        ("duplicates", "foreign", "idle", "rejected", "forged", "not_checkable"),
    )
    assert info["metrics"] == {**dict.fromkeys(ones, 1.0), **dict.fromkeys(none, 0.0)}
    assert env.agents == []  # above 5.8


@needs_sandbox
@pytest.mark.parametrize(
    ("first", "second", "points"),
    [
        (ONE, "", (1.0, 2.0, 0.0)),  # half of the methods, half of the tests
        (BODIES["add"], "", (0.5, 1.0, 0.0)),
        ("", "", (0.0, 0.0, 0.0)),
        (ONE, BODIES["total"] + "def put(self, i, x):\n    return 0\n", (2.0, 3.0, 0.0)),  # written, but wrong
        (ONE, BODIES["total"] + "def put(self, i, x):\n    '''Insert.'''\n    ...\n", (1.5, 3.0, 0.0)),  # no body
        (ONE, BODIES["total"] + "def put(self, i, x): pass\n", (1.5, 3.0, 0.0)),
        (ONE, "put = lambda self, i, x: self.xs.insert(i, x)\n" + BODIES["total"], (1.5, 3.0, 0.0)),  # no definition
        (ONE + BODIES["total"], REST, (2.0, 4.0, -0.25)),  # one of four written twice
        (ONE + REST, ONE + REST, (2.0, 4.0, -1.0)),
        (ONE + REST, "", (1.0, 2.0, 0.0)),  # another's methods are left out, even where nobody else wrote them
        (REST, ONE, (0.0, 0.0, 0.0)),
        (REST, BODIES["put"], (0.5, 1.0, -0.25)),
        (ONE, "def total(self)\n    return 1", (0.0, 0.0, 0.0)),  # does not parse
        (ONE, "I would rather not.", (0.0, 0.0, 0.0)),
        (ONE + BODIES["total"], "def total(self", (0.0, 0.0, 0.0)),
        (ONE, REST.replace("sum(self.xs)", "1 / 0"), (2.0, 3.0, 0.0)),
        (ONE, REST.replace("return sum(self.xs)", "raise unittest.SkipTest"), (2.0, 3.0, 0.0)),
        (ONE, REST.replace("return sum(self.xs)", "raise SystemExit"), (2.0, 3.0, 0.0)),
        (ONE, REST.replace("return sum(self.xs)", "__import__('os')._exit(0)"), (2.0, 3.0, 0.0)),
        (f"{ONE}import os\nos._exit(0)\n", REST, (2.0, 4.0, 0.0)),  # a top-level call is left out
    ],
)
def test_points_by_hand(first, second, points):
    assert judge(first, second)[0] == pytest.approx(points)


@needs_sandbox
def test_a_program_that_raises_at_once_passes_no_test():
    assert judge(ONE + "import no_such_module\n", REST)[0] == (2.0, 0.0, 0.0)
    assert judge(ONE + "x = 1 / 0\n", REST)[0] == (2.0, 0.0, 0.0)


@needs_sandbox
def test_metrics_by_hand():
    _, metrics = judge(ONE + BODIES["total"] + "print(1)\n", REST)
    assert (metrics["duplicates"], metrics["foreign"], metrics["rejected"], metrics["parsed"]) == (1, 1, 2, 1)
    _, metrics = judge(ONE, "?!")
    assert (metrics["methods_written"], metrics["rejected"], metrics["parsed"], metrics["tests_passed"]) == (0.5, 1, 0, 0)


@needs_sandbox
def test_any_number_of_agents():
    assert judge(ONE + REST)[0] == (2.0, 4.0, 0.0)
    assert judge(BODIES["add"] + BODIES["put"], BODIES["total"], BODIES["below"])[0] == (2.0, 4.0, 0.0)
    assert judge(ONE, REST, BODIES["below"])[0] == pytest.approx((1.5, 3.0, -0.25))  # by round robin total is agent_1's
    points, metrics = judge(*BODIES.values(), "whatever this is")
    assert points == (2.0, 4.0, 0.0)  # who has nothing to write cannot break the class
    assert (metrics["idle"], metrics["rejected"]) == (1, 1)
    # The worst: three agents, all four methods written twice, none by its owner.
    shifted = (BODIES["total"] + BODIES["below"], BODIES["below"] + ONE + BODIES["put"], BODIES["add"] + REST)
    points, metrics = judge(*shifted)
    assert points == (0.0, 0.0, -1.0)
    assert metrics["duplicates"] == 4


# --- answers -------------------------------------------------------------------------------------------------------------

CLASS = "class Pile:\n    def __init__(self):\n        self.xs = 'mine'\n" + "".join(
    f"    {line}\n" for line in ONE.splitlines()
)


@needs_sandbox
@pytest.mark.parametrize(
    "first",
    [
        f"Sure:\n```python\n{ONE}```\nThat is all.",
        f"```\n{BODIES['add']}```\nand\n```py\n{BODIES['below']}```",
        "".join(f"    {line}\n" for line in ONE.splitlines()),  # indented
        f"Here they are:\n\n{ONE}\nI hope it helps, doesn't it?",
        f"```python\n{ONE}\nprint(Pile(\n```\nand\n```\n>>> Pile().add(1)\n```",
        f"Sure:\n  ```python\n{CLASS}",
        f"{ONE}\nprint(Pile([1, 2",
        CLASS,  # within the class; the given constructor stays
        f"import os\nLIMIT = 3\ndef small(y, x):\n    return y < x\n{BODIES['add']}"
        "def below(self, x):\n    return [y for y in self.xs if small(y, x) and LIMIT]\n",
        "def _keep(self, y):\n    self.xs.append(y)\ndef add(self, x):\n    self._keep(x)\n"
        + BODIES["below"],  # a member of its own
        "from __future__ import annotations\n" + ONE,
        "def add(self, x):\n    return math.sqrt('')\n" + ONE,  # the last definition counts
        ONE.replace("self, x", "self, x: int").replace("):", ") -> object:"),
        "import functools\n" + ONE.replace("def below", "@functools.cache\ndef seven():\n    return 7\n\ndef below"),
    ],
)
def test_a_right_answer_in_any_form(first):
    assert judge(first, REST)[0] == (2.0, 4.0, 0.0)


def test_shares():
    assert shares(TASK, ["a", "b"], "parameters") == {"a": ["add", "below"], "b": ["total", "put"]}
    assert shares(TASK, ["a", "b"], "round_robin") == {"a": ["add", "below"], "b": ["total", "put"]}
    assert shares(TASK, ["a", "b", "c"], "parameters") == {"a": ["add", "put"], "b": ["total"], "c": ["below"]}
    assert shares(TASK, ["a"], "parameters") == {"a": ["add", "total", "below", "put"]}


def test_methods_that_methods_info_lacks_belong_to_the_last_agent():
    infos = [info for info in ROW["methods_info"] if info["method_name"] != "below"]
    task = read_task({**ROW, "methods_info": infos, "skeleton": ROW["skeleton"]}, "here")
    assert task.unlisted == ("below",)
    assert shares(task, ["a", "b"], "parameters") == {"a": ["add"], "b": ["total", "put", "below"]}
    assert shares(task, ["a", "b", "c"], "round_robin") == {"a": ["add"], "b": ["total"], "c": ["put", "below"]}


@pytest.mark.parametrize(
    ("head", "count"),
    [
        ("def f(self):", 0), ("def f(self, x):", 1), ("def f(x):", 1), ("def f(x, y=3):", 2), ("def f(self, *xs):", 1),
        ("def f(cls, a, *, b):", 2), ("def f(self, x: dict = {1: ':'}) -> list[int]:", 1), ("@staticmethod\n    def f(x):", 1),
        ("async def f(self, **options):", 1), ("def f(\n    self,\n    x,\n):", 1),
    ],
)  # fmt: skip
def test_parameters_are_counted(head, count):
    assert num_parameters(f'{head}\n    """It is: “odd".\n    """', "f") == count


def test_what_is_no_body():
    for body in ("pass", "...", "'doc'", "'doc'; pass", "1"):
        assert not is_written([ast.parse(f"def f():\n    {body}").body[0]]), body
    assert is_written([ast.parse("def f():\n    return").body[0]])
    assert not is_written([])


def test_the_class_is_put_together_in_order():
    answers = {"a": read_answer(f"import os\nK = 1\n{REST}", TASK), "b": read_answer(ONE, TASK)}
    program = merged(TASK, answers, {"a": ["total", "put"], "b": ["add", "below"]})
    lines = [line for line in program.splitlines() if line.startswith(("import", "K", "class", "    def"))]
    heads = ["__init__(self):", "add(self, x):", "total(self):", "below(self, x):", "put(self, i, x):"]
    assert lines == ["import math", "import os", "K = 1", "class Pile:", *(f"    def {head}" for head in heads)]


def test_a_header_without_a_body_and_without_python():
    for header in ("class Pile: \n", "class Pile", "", "class Other:\n    pass"):
        program = merged(read_task({**ROW, "class_constructor": header}, "here"), {}, {})
        assert program.strip().endswith("class Pile:\n    pass")


PIECES = st.sampled_from(
    [
        *BODIES.values(),
        *("class Pile:\n", "    ", "\t", "\n", "```", "```python\n", "def add(self, x):", "return", "\x00", "(", "[", "\ud800"),
        *("import os\n", "add = 1\n", "async ", "lambda: ", "9" * 5000, "@", ":", "\\", "'''", "f'{", "\u2028", "yield x\n"),
    ]
)
HOSTILE = st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=12).map("".join))


@settings(max_examples=300, deadline=2000, derandomize=True, database=None)
@given(text=HOSTILE)
@example(text="(" * 20_000)
@example(text="-" * 19_000 + "1")
@example(text="def add(self, x):\n  return " + "a+" * 9_000 + "a")
@example(text="def add(self, x):\n  return 0x" + "f" * 15_000)
@example(text="```" + " " * 19_990)
@example(text="x" * (1 << 22))
@example(text="class Pile:\n" * 1_500)
def test_no_text_breaks_the_reading(text):
    answer = read_answer(text, TASK)
    if answer is not None:
        program = merged(TASK, {"a": answer}, {"a": TASK.methods})
        assert program is None or isinstance(ast.parse(program), ast.Module)


@needs_sandbox
def test_hostile_answers_are_judged():
    begun = time.monotonic()
    for text in ("\x00", "\ud800", "x" * (1 << 22), "lambda:" * 2_800 + "0", "raise SystemExit"):
        _, info = turn(start(), text, REST)
        assert info["raw_reward"] <= 3
        assert info["metrics"]["tests_passed"] <= 0.5
    assert time.monotonic() - begun < 20


@needs_sandbox
def test_answers_that_try_to_pass_every_test():
    for text in (
        "import unittest\nunittest.TestResult.wasSuccessful = lambda self: True\n",
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n",
        "def _run_last(tests): pass\n",
        "import sys\nsys.exit(0)\n",
    ):
        assert judge(text, "")[0] == (0.0, 0.0, 0.0)


# --- what agents read ----------------------------------------------------------------------------------------------------


def test_first_observations():
    env = ClassEval(wording="terse")
    env.rows, env.num_tasks = (ROW,), 1
    observations, _ = env.reset(seed=0, options={"task": 0})
    assert env.task_name(env.task) == "Pile"
    for agent, own in (("agent_0", "add, below"), ("agent_1", "total, put")):
        text = observations[agent]
        assert text.startswith(f"You are {agent}, one of 2 programmers of this Python class.")
        assert SKELETON.strip() in text
        assert f"\nYour methods: {own}\n" in text
        assert "assertEqual" not in text
    alone = ClassEval(wording="terse", agents=1)
    alone.rows = (ROW,)
    text = alone.reset(seed=0, options={"task": 0})[0]["agent_0"]
    assert "team" not in text
    assert "Your methods: add, total, below, put" in text


@needs_sandbox
def test_feedback_by_level():
    read, _ = turn(start(), BODIES["add"] + "def below(self, x):\n    return 0\n", BODIES["put"])
    assert read["agent_0"].splitlines() == [
        "4 of 8 hidden tests passed.",
        "Failed tests of your methods: PileTestBelow.test_below_1, PileTestBelow.test_below_2",
        "Write all your methods again, better.",
    ]
    assert read["agent_1"].splitlines()[:2] == ["You left out: total.", "4 of 8 hidden tests passed."]
    assert "PileTestBelow" not in read["agent_1"]
    read, _ = turn(start(), "?", REST)
    assert read["agent_0"].splitlines()[0] == "Your answer is no Python."
    assert read["agent_1"].splitlines()[0] == "The class cannot be read: the answer of a team-mate is no Python."
    assert "Failed" not in read["agent_1"]
    read, _ = turn(start(feedback="plain"), ONE, "")
    assert set(read.values()) == {"Write all your methods again, better."}


@needs_sandbox
def test_at_most_five_failed_tests_are_named():
    tests = ROW["test"].replace(
        "test_add_2", "test_add_2(self): self.fail()\n    def test_add_3(self): self.fail()\n    def test_add_4"
    )
    tests = tests.replace("def test_below_1", "def test_below_0(self): self.fail()\n    def test_below_1")
    read, info = turn(start({**ROW, "test": tests}), "def add(self, x): return 1\ndef below(self, x): return 1\n", REST)
    assert info["metrics"]["tests_passed"] == pytest.approx(4 / 11)
    assert read["agent_0"].count("PileTest") == 5


@needs_sandbox
def test_who_has_no_method_is_told_so():
    env = ClassEval(wording="terse", agents=5)
    env.rows = (ROW,)
    observations, _ = env.reset(seed=0, options={"task": 0})
    assert observations["agent_4"].endswith("You have no method to write. Answer: pass")
    read, _ = turn(env, *BODIES.values(), "pass")
    assert read["agent_4"].endswith("You have no method to write. Answer: pass")


@needs_sandbox
def test_the_state_holds_what_a_critic_may_know():
    env = start()
    assert "agent_0 writes: add, below" in env.state()
    turn(env, ONE, "")
    assert "failed: PileTestTotal.test_total_1" in env.state()
    assert "return [y for y in self.xs if y < x]" in env.state()


@needs_sandbox
def test_a_class_that_keeps_files_may_read_what_an_earlier_test_left():
    head = "class Note:\n    def __init__(self):\n        pass\n"
    save, load = (
        "def save(self, x):\n    with open('n', 'w') as f: f.write(x)\n",
        "def load(self):\n    return open('n').read()\n",
    )
    row = {
        **ROW,
        "class_name": "Note",
        "class_constructor": head,
        "skeleton": head,
        "methods_info": [
            {"method_name": "save", "method_description": save},
            {"method_name": "load", "method_description": load},
        ],
        "test": "import unittest\nclass A(unittest.TestCase):\n    def test_save(self): Note().save('x')\n"
        "class B(unittest.TestCase):\n    def test_load(self): self.assertEqual(Note().load(), 'x')\n",
    }
    assert turn(start(row), save, load)[1]["raw_reward"] == 6
    assert turn(start(row), save, load.replace("'n'", "'m'"))[1]["raw_reward"] == 4
    assert turn(start(row), save.replace("f.write(x)", "pass"), load)[1]["raw_reward"] == 4


# --- built-in classes ----------------------------------------------------------------------------------------------------


def solved(env: ClassEval) -> dict[str, str]:
    """The reference solution, each agent with its own methods; the first also with what else the class holds."""
    tree = ast.parse(env.problem.solution)
    (found,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == env.problem.class_name]
    beside = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    beside += [n for n in found.body if getattr(n, "name", "") not in env.problem.methods and not isinstance(n, ast.Expr)]
    texts = {}
    for agent, own in env.owned.items():
        nodes = [*beside, *(node for node in found.body if getattr(node, "name", "") in own)]
        texts[agent] = ast.unparse(ast.Module(nodes, [])) or "pass"
        beside = []
    return texts


def test_splits_share_no_set_of_methods():
    sets = {}
    for split, count in NUM_TASKS.items():
        rows = sample_tasks(split)
        assert len(rows) == count
        sets[split] = {frozenset(info["method_description"] for info in row["methods_info"]) for row in rows}
        assert len(sets[split]) > 0.9 * count
    assert not sets["train"] & sets["eval"]
    assert sample_tasks("train")[:1] == sample_tasks.__wrapped__("train")[:1]  # the same in every process


def test_built_in_classes_are_short_and_give_both_agents_work():
    env = ClassEval(wording="terse")
    for task in range(0, env.num_tasks, 7):
        observations, _ = env.reset(seed=0, options={"task": task})
        assert [len(own) for own in env.owned.values()] == [2, 2]
        assert all(len(text.split()) < 120 and text.isascii() for text in observations.values())


@needs_sandbox
@pytest.mark.parametrize("agents", [1, 2, 3])
def test_reference_solutions_of_built_in_classes_earn_6(agents):
    for split in ("train", "eval"):
        env = ClassEval(wording="terse", agents=agents, split=split)
        for task in range(2):
            env.reset(seed=0, options={"task": task + 10 * agents})
            *_, infos = env.step(solved(env))
            assert infos["agent_0"]["raw_reward"] == 6
            env.reset(seed=0, options={"task": task + 10 * agents})
            nothing = dict.fromkeys(env.agents, "pass")
            assert env.step(nothing)[4]["agent_0"]["raw_reward"] == 0


@needs_sandbox
def test_the_methods_of_another_class_do_not_pass():
    env = ClassEval(wording="terse")
    env.reset(seed=0, options={"task": 0})
    other = ClassEval(wording="terse")
    other.reset(seed=0, options={"task": 1})
    assert env.step(solved(other))[4]["agent_0"]["raw_reward"] < 3


@needs_sandbox
@pytest.mark.parametrize(
    "options",
    [{}, {"agents": 1}, {"agents": 3, "turns": 1}, {"agents": ["ann", "bob"], "share": "round_robin", "feedback": "plain"}],
)
def test_check_env(options):
    check_env(make("class_eval", **options), episodes=2)


@needs_sandbox
def test_poor_players_earn_between_a_tenth_and_a_half(monkeypatch):
    earned: list[float] = []
    play = ClassEval.play

    def noted(env, answers):
        outcome = play(env, answers)
        earned.append(outcome.reward)
        return outcome

    monkeypatch.setattr(ClassEval, "play", noted)
    chats = [chat for seed in range(70) for chat in classes.class_eval(random.Random(seed))]
    assert 0.6 < sum(earned) / len(earned) < 3.0
    assert len({round(reward, 2) for reward in earned}) > 10
    answers = [answer for chat in chats for _, answer in chat]
    assert len(set(answers)) > 0.8 * len(answers)
    assert max(map(len, answers)) < 600
    assert chats[:2] == classes.class_eval(random.Random(0))[:2]


# --- options and public data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agents": 0}, "agents"), ({"turns": 0}, "turns"), ({"share": "even"}, "share"), ({"feedback": "all"}, "feedback"),
        ({"data": "/no/such/file.json"}, "data"), ({"eval_data": "x.json"}, "eval_data"),
    ],
)  # fmt: skip
def test_impossible_options_are_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        make("class_eval", **options)


@pytest.mark.parametrize("change", [{"methods_info": []}, {"methods_info": 3}, {"test": "import unittest"}, {"skeleton": None}])
def test_rows_of_another_format_are_refused(tmp_path, change):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**ROW, **change}]))
    with pytest.raises(ConfigError, match=r"rows\.json"):
        make("class_eval", data=str(path))
    path.write_text(json.dumps([{"prompt": "x"}]))
    with pytest.raises(ConfigError, match=r"rows\.json"):
        make("class_eval", data=str(path))


def test_rows_of_a_public_file_are_split_as_the_paper_does(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{**ROW, "task_id": f"T{number}"} for number in range(100)]))
    train, held_out = ClassEval(wording="terse", data=str(path)), ClassEval(wording="terse", data=str(path), split="eval")
    assert (train.num_tasks, train.task_name(0), train.task_name(65)) == (66, "T0", "T65")
    assert (held_out.num_tasks, held_out.task_name(0), held_out.task_name(15)) == (16, "T66", "T81")
    both = ClassEval(wording="terse", data=f"{path}[:10]", eval_data=f"{path}[10:15]", split="eval")
    assert (both.num_tasks, both.task_name(0)) == (5, "T10")
    with pytest.raises(EnvError, match="no row"):
        ClassEval(wording="terse", data=f"{path}[:60]", split="eval")


# Dates (17), a host's name (48), a result that changed with numpy (51), and packages that the sandbox does not show: pandas
# (28), python-docx (34), openpyxl (38), gensim (44), Pillow (45), nltk (52).
BROKEN = {17, 28, 34, 38, 44, 45, 48, 51, 52}


def _public(tasks: list[int], **options: Any) -> dict[int, float]:
    """What the reference solution of each task earns, apart among the agents."""
    env = ClassEval(wording="terse", data=str(DATA / CLASSES), **options)
    earned = {}
    for task in tasks:
        env.reset(seed=0, options={"task": task})
        *_, infos = env.step(solved(env))
        metrics = infos["agent_0"]["metrics"]
        assert (metrics["methods_written"], metrics["duplicates"], metrics["rejected"]) == (1, 0, 0), task
        earned[task] = infos["agent_0"]["raw_reward"]
    return earned


@needs_sandbox
@needs(CLASSES)
def test_some_public_solutions_earn_6():
    tasks = [0, 3, 9, 22, 25, 30, 43, 46, 49]  # also skeletons that are no Python, numpy, files, methods that are not listed
    assert _public(tasks) == dict.fromkeys(tasks, 6.0)


@needs(CLASSES)
def test_a_part_of_the_public_classes_leaves_an_agent_idle():
    env = ClassEval(wording="terse", data=str(DATA / CLASSES))
    idle = [0, 0]
    for task in range(min(env.num_tasks, 60)):
        for number, share in enumerate(("parameters", "round_robin")):
            env.share = share
            env.reset(seed=0, options={"task": task})
            idle[number] += any(not own for own in env.owned.values())
    assert idle == [25, 0]


@pytest.mark.slow
@needs_sandbox
@needs(CLASSES)
@pytest.mark.parametrize("options", [{}, {"agents": 1}, {"agents": 3}])
def test_all_public_solutions_earn_6_but_for_those_that_cannot(options):
    earned = _public(list(range(60)), **options)
    assert {task for task, reward in earned.items() if reward < 6} == BROKEN
