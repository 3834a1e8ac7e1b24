"""`class_eval`: programmers each write their own methods of one class; the reward comes from the class's tests."""

from __future__ import annotations

import ast
import random
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.coding.class_eval_wording import PLAIN, TERSE
from collm.envs.coding.class_samples import sample_tasks
from collm.envs.coding.classes import ClassTask, PublicTest, is_written, merged, methods_in, read_answer, read_task, shares
from collm.envs.coding.programs import read
from collm.envs.data import split_rows
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError
from collm.sandbox import Job, judge

TEST_SECONDS, MAX_TIMEOUTS = 40.0, 3
SHOWN_CHARACTERS = 8_000
METHOD_POINTS, TEST_POINTS, DUPLICATE_POINTS = 2.0, 4.0, 1.0


class ClassEval(TextEnv):
    """Each agent writes its own methods of a class without seeing the others' answers. All agents read the class's skeleton.

    Raw reward of a turn: 2 * (assigned methods that were written / all methods) + 4 * (tests passed / all tests of the class)
    - (methods that more than one agent wrote / all methods). It is 0 if the answer of an agent that has methods to write
    cannot be read as Python. A method counts as written if its body holds more than a docstring, `pass` and `...`. Methods of
    other agents, and an agent's version of a given constructor, are left out of the class. Other members, imports, functions
    and assignments are kept. Every test runs alone in the sandbox for at most 40 seconds; after three time-outs the remaining
    tests are not run and count as failed. A test of a class that opens files may also pass after the tests that passed before
    it, since some public tests read files that other tests wrote.
    Ends after `turns` turns, or once the raw reward exceeds 5.8. Perfect play earns 6: all methods are correct and none is
    written twice. Raw rewards are shifted by -6.
    Metrics: tests_passed, methods_written (fractions), duplicates, foreign (methods of other agents that were written), parsed
    (0 or 1), idle (agents without a method to write), rejected (answers that are not Python, and parts that were left out).
    Diagnostics, which critics do not read: forged (tests that also passed with another expected literal; they count as failed),
    not_checkable (tests that do not compare with a literal by assertEqual or ==).

    Args:
        agents: how many programmers, or their names.
        turns: how many turns an episode has; in each, agents write all their methods again.
        data: classes in ClassEval's public format; rows 0..65 are for training and rows 66..81 are held out. Default:
            generated small classes.
        eval_data: a separate source of held-out classes; `data` is then taken whole.
        share: "parameters" assigns the methods with exactly one parameter besides self to the first of two agents and the
            rest to the second, which leaves one of them idle in many classes; "round_robin" assigns methods in turn. Other
            numbers of agents always use "round_robin".
        feedback: what agents read from the second turn on: "level" whether the answers could be read, the number of tests
            passed and the failed tests of their own methods; "plain" only a request to revise.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval". No generated class of one split has the same set of methods as one of the other.
    """

    shift = -6.0
    stop_above: float | None = 5.8
    max_reward = 6.0
    waits = True
    diagnostics = frozenset({"forged", "not_checkable"})

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 2,
        data: str | None = None,
        eval_data: str | None = None,
        share: Literal["parameters", "round_robin"] = "parameters",
        feedback: Literal["level", "plain"] = "level",
        wording: Wording = "plain",
        split: str = "train",
    ):
        super().__init__(agent_names(agents, "agent"), turns)
        for name, value, allowed in (
            ("share", share, ("parameters", "round_robin")),
            ("feedback", feedback, ("level", "plain")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        if data is None and eval_data is not None:
            raise EnvError(f"eval_data={eval_data!r} needs data=...: the built-in classes hold out their own.")
        self.source = data if data is not None else f"built-in, {split}"
        self.rows = (
            sample_tasks(split)
            if data is None
            else split_rows(data, eval_data, split, train=slice(0, 66), held_out=slice(66, 82))
        )
        self.num_tasks = len(self.rows)
        self.class_of(0)  # raises for a source of another format
        self.share, self.feedback = share, feedback
        self.wording = texts_of(wording, PLAIN, TERSE)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.problem = self.class_of(task)
        self.owned = shares(self.problem, self.possible_agents, self.share)
        self.program: str | None = None
        self.failed: list[str] = []
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def class_of(self, task: int) -> ClassTask:
        return read_task(self.rows[task], self.source)

    def num_parts(self, answer: str) -> int:
        """Its statements, those of a class one by one; 1 if it is not Python."""
        tree = read(answer)
        return 1 if tree is None else sum(len(node.body) if isinstance(node, ast.ClassDef) else 1 for node in tree.body)

    def task_name(self, task: int) -> str:
        return str(self.rows[task].get("task_id", task))

    def play(self, answers: dict[str, str]) -> Outcome:
        problem, total = self.problem, len(self.problem.methods)
        read = {agent: read_answer(answer, problem) for agent, answer in answers.items()}
        unread = [agent for agent, answer in read.items() if answer is None]
        clear = {agent: answer for agent, answer in read.items() if answer is not None}
        writers = Counter(name for answer in clear.values() for name in answer.methods)
        duplicates = sum(count > 1 for count in writers.values())
        foreign = sum(name not in self.owned[agent] for agent, answer in clear.items() for name in answer.methods)
        written = {
            agent: [name for name in self.owned[agent] if agent in clear and is_written(clear[agent].methods.get(name, []))]
            for agent in answers
        }
        num_written = sum(map(len, written.values()))
        self.program = None if any(self.owned[agent] for agent in unread) else merged(problem, clear, self.owned)
        passed, forged = self._passed()
        self.failed = [test.name for test, good in zip(problem.tests, passed) if not good]
        parts = dict.fromkeys(("methods", "tests", "duplicates"), 0.0)
        if self.program is not None:
            parts["methods"] = METHOD_POINTS * num_written / total
            parts["tests"] = TEST_POINTS * sum(passed) / len(passed)
            parts["duplicates"] = -DUPLICATE_POINTS * duplicates / total
        metrics = {
            "tests_passed": sum(passed) / len(passed),
            "methods_written": num_written / total,
            "duplicates": float(duplicates),
            "foreign": float(foreign),
            "parsed": float(self.program is not None),
            "forged": float(forged),
            "not_checkable": float(sum(problem.canary(test) is None for test in problem.tests)),
            "idle": float(sum(not own for own in self.owned.values())),
            "rejected": float(len(unread) + foreign + sum(answer.dropped for answer in clear.values())),
        }
        observations = {agent: self.wording.later(self, agent, unread, written[agent], passed) for agent in answers}
        return Outcome(sum(parts.values()), parts, observations, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """Each agent's methods from the reference solution; {} if the class has none."""
        solved = methods_in(self.problem.solution, self.problem.class_name)
        if not solved:
            return {}
        return {agent: "\n".join(solved[name] for name in own if name in solved) or "pass" for agent, own in self.owned.items()}

    def state(self) -> str:
        lines = [f"class {self.problem.class_name} turn {self.turn} of {self.turns}"]
        lines += [f"{agent} writes: {', '.join(own) or 'nothing'}" for agent, own in self.owned.items()]
        lines += [f"failed: {' '.join(self.failed)}"] if self.turn else []
        lines += ["class as written:", self.program] if self.program else []
        lines += ["solution:", self.problem.solution]
        return "\n".join(lines)[:SHOWN_CHARACTERS]

    def _passed(self) -> tuple[list[bool], int]:
        """Which tests pass, and how many are forged: they also pass with another expected literal and count as failed.

        A test passes alone or, if the class opens files, after the tests that passed before it.
        """
        tests = self.problem.tests
        if self.program is None:
            return [False] * len(tests), 0
        passed, after = self._first_passed(self.program)
        canaries = {
            place: canary
            for place, good in enumerate(passed)
            if good and (canary := self.problem.canary(tests[place], after.get(place, ()))) is not None
        }
        if canaries:
            for place, fooled in zip(canaries, self._judge(self.program, [*canaries.values()])):
                passed[place] = not fooled
        return passed, sum(not passed[place] for place in canaries)

    def _first_passed(self, program: str) -> tuple[list[bool], dict[int, list[PublicTest]]]:
        """Which tests pass, and for each test that failed alone the tests that ran before it in the second attempt."""
        tests = self.problem.tests
        alone = self._judge(program, [self.problem.check(test) for test in tests])
        if "open(" not in program or all(alone) or not any(alone):
            return alone, {}
        failed = [place for place, good in enumerate(alone) if not good]
        before = [[test for test, good in zip(tests[:place], alone) if good] for place in failed]
        again = self._judge(program, [self.problem.check(tests[place], after) for place, after in zip(failed, before)])
        passed = [good or dict(zip(failed, again)).get(place, False) for place, good in enumerate(alone)]
        return passed, dict(zip(failed, before))

    def _judge(self, program: str, checks: Sequence[str]) -> list[bool]:
        entries, setup = (self.problem.class_name,), "\n".join(self.problem.imports)
        (verdicts,) = judge([Job(program, tuple(checks), TEST_SECONDS, MAX_TIMEOUTS, entries=entries, setup=setup)])
        return [verdict.passed for verdict in verdicts]
