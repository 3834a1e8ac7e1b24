"""`coop_code`: programmers write the parts of one program at the same time; the reward comes from its tests."""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from typing import Literal

from collm.envs.base import Outcome, TextEnv
from collm.envs.coding.canaries import canary_of, with_other_results
from collm.envs.coding.coop_code_wording import PLAIN, TERSE
from collm.envs.coding.problems import NUM_GENERATED, Problem, generated, public, worked
from collm.envs.coding.programs import function, parse, read, returns_something, source_of, taken, use_of
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError
from collm.sandbox import Job, Verdict, judge


class CoopCode(TextEnv):
    """Helpers each write one function and `main` writes the tested function, which can call theirs, all at the same time.

    The last agent is main and writes the problem's entry point; every other agent writes one function of its own name (`aux`;
    with more helpers `aux_2`, `aux_3`, ...). The program consists of the problem's own imports and definitions, then the
    imports, definitions and top-level assignments of every agent, helpers first; answers may be fenced. Every test runs alone
    in the sandbox; after three time-outs the remaining tests are not run.

    Raw reward of a turn, summed in this order:
        helpers  0.4 * fraction of the helpers whose function is defined and returns a value
        entry    0.6 if the entry point is defined and returns a value; otherwise the sum ends here
        parse    0.5 if the code of all agents parses, separately and together; otherwise the sum ends here
        tests    fraction of the tests passed
        calls    0.5 * fraction of the helpers' functions that main calls, if any test passes
        work     1.0 if main calls a helper and is not a thin wrapper, if any test passes (thin wrapper, after the docstring:
                 nothing; one return that holds a call; or one assignment that holds a call and then a return)
        ignored  -0.5 if main calls helpers and never reads their results, if any test passes
    Perfect play earns 4; rewards are shifted by -4, and an episode ends above 3.8 or after `turns` turns. A single agent writes
    the whole program and earns at most 2.1 (entry, parse, tests), shifted by -2.1; its episode ends above 2.0.
    Metrics: passed (fraction of tests), helpers and calls (fractions), entry, parse, thin and ignored (0 or 1), rejected
    (answers without usable code). Diagnostics, which critics do not read: forged (tests that also passed with another expected
    literal, because a result equals everything; they count as failed), not_checkable (tests that do not compare with a literal
    by ==), needed (1 if a passed test fails once the called helpers return something else, otherwise 0).

    Args:
        agents: how many programmers, or their names, main last.
        turns: how many turns an episode has.
        data: problems in the format of HumanEval, CoopHumanEval or sanitized MBPP, each with the fixed slices of its set
            (or your own rows `[a:b]`, the last fifth held out); default: generated small problems on lists of numbers.
        eval_data: a separate source of held-out problems. Problems known to be in both sets are named in a warning.
        feedback: what agents read from the second turn on: "level" the parts earned, the number of tests passed, the types of
            error of the first `sandbox_slice` failed tests and, for main, how it uses the helpers; "plain" only a request to
            revise.
        sandbox_slice: of how many failed tests the type of error is given.
        seconds: time limit of one test.
        reward: "guarded" gives calls and work only if a passed test fails once the helpers return something else; "paper" gives
            them without this condition.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval". The generated problems of the two are disjoint.
    """

    waits = True
    diagnostics = frozenset({"forged", "not_checkable", "needed"})

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 2,
        data: str | None = None,
        eval_data: str | None = None,
        feedback: Literal["level", "plain"] = "level",
        sandbox_slice: int = 1,
        seconds: float = 10.0,
        reward: Literal["paper", "guarded"] = "paper",
        wording: Wording = "plain",
        split: str = "train",
    ):
        super().__init__(_names(agents), turns)
        for name, value, allowed in (
            ("feedback", feedback, ("level", "plain")),
            ("reward", reward, ("paper", "guarded")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        if sandbox_slice < 0 or not 0 < seconds <= 3600:
            raise EnvError(f"sandbox_slice={sandbox_slice}, seconds={seconds}: give 0 or more errors, and seconds above 0.")
        if eval_data is not None and data is None:
            raise EnvError(f"eval_data={eval_data!r} holds the evaluation problems of data; set data=... too.")
        self.split = split
        self.problems = None if data is None else public(data, eval_data, split)
        self.num_tasks = NUM_GENERATED[split] if self.problems is None else len(self.problems)
        self.feedback, self.slice, self.seconds, self.reward = feedback, sandbox_slice, seconds, reward
        self.wording = texts_of(wording, PLAIN, TERSE)
        *self.helpers, self.main = self.possible_agents
        if self.helpers:
            self.shift, self.stop_above, self.max_reward = -4.0, 3.8, 4.0
        else:
            self.shift, self.stop_above, self.max_reward = -2.1, 2.0, 2.1

    def problem_of(self, task: int) -> Problem:
        return generated(self.split, task) if self.problems is None else self.problems[task]

    def num_parts(self, answer: str) -> int:
        return 1

    def task_name(self, task: int) -> str:
        return self.problem_of(task).name

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.problem = self.problem_of(task)
        self.parts: dict[str, float] = {}
        self.errors: list[str] = []
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        trees = {agent: read(answer) for agent, answer in answers.items()}
        nodes = {agent: [] if tree is None else taken(tree) for agent, tree in trees.items()}
        entry_point = self.problem.entry_point
        helped = [agent for agent in self.helpers if returns_something(function(nodes[agent], agent))]
        use = use_of(nodes[self.main], entry_point, helped)
        called = [agent for agent in helped if use_of(nodes[self.main], entry_point, [agent]).calls]
        parts: dict[str, float] = {}
        if self.helpers:
            parts["helpers"] = 0.4 * len(helped) / len(self.helpers)
        verdicts: list[Verdict] = []
        forged, needed = [False] * len(self.problem.checks), 0.0
        has_entry = returns_something(function(nodes[self.main], entry_point))
        program = self._program(nodes) if all(tree is not None for tree in trees.values()) else None
        if has_entry:
            parts["entry"] = 0.6
            if program is not None:
                parts["parse"] = 0.5
                [verdicts] = judge([self._job(program, self.problem.checks)])
                forged, needed = self._doubts(program, verdicts, called)
                verdicts = [Verdict(False, "AssertionError") if bad else one for one, bad in zip(verdicts, forged)]
        passed = sum(verdict.passed for verdict in verdicts) / len(self.problem.checks)
        earned = 1.0 if self.reward == "paper" else needed
        if verdicts:
            parts["tests"] = passed
        if passed and self.helpers:
            parts["calls"] = 0.5 * earned * len(called) / len(self.helpers)
            parts["work"] = earned * (use.calls and not use.thin)
            parts["ignored"] = -0.5 if use.ignored else 0.0
        self.parts, self.errors = parts, [verdict.error for verdict in verdicts if not verdict.passed]
        wanted = {agent: agent if agent in self.helpers else entry_point for agent in answers}
        metrics = {
            "passed": passed,
            "helpers": len(helped) / max(1, len(self.helpers)),
            "entry": float(has_entry),
            "parse": float(program is not None),
            "calls": len(called) / max(1, len(self.helpers)),
            "thin": float(use.calls and use.thin),
            "ignored": float(use.ignored),
            "forged": float(sum(forged)),
            "not_checkable": float(sum(canary_of(check) is None for check in self.problem.checks)),
            "needed": needed,
            "rejected": float(sum(function(nodes[agent], name) is None for agent, name in wanted.items())),
        }
        said = {agent: self.wording.later(self, agent, passed, use) for agent in answers}
        return Outcome(sum(parts.values()), parts, said, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """The reference solution, divided; {} if the problem has none."""
        return worked(self.problem, self.helpers, self.main)

    def state(self) -> str:
        earned = ", ".join(f"{name} {value:.2f}" for name, value in self.parts.items()) or "nothing yet"
        tests = "".join(self.problem.checks)
        return f"problem {self.problem.name} turn {self.turn} of {self.turns}: {earned}\ntests:\n{tests}"

    def _job(self, program: str, checks: Sequence[str], runs: int = 1) -> Job:
        seconds, entries = min(3600.0, runs * self.seconds), (self.problem.entry_point,)
        return Job(program, tuple(checks), seconds, entries=entries, setup=self.problem.header)

    def _doubts(self, program: str, verdicts: Sequence[Verdict], called: list[str]) -> tuple[list[bool], float]:
        """Which tests also pass with another expected literal, and whether the passed tests depend on the helpers' results.

        The second value comes from one run of all passed tests with the helpers' results changed, up to the first failure.
        """
        passed = [check for check, verdict in zip(self.problem.checks, verdicts) if verdict.passed]
        canaries = {check: other for check in passed if (other := canary_of(check)) is not None}
        jobs = [self._job(program, [*canaries.values()])] if canaries else []
        if passed and called:
            jobs.append(self._job(with_other_results(program, called), ["\n".join(passed)], len(passed)))
        found = judge(jobs) if jobs else []
        fooled = {check for check, verdict in zip(canaries, found[0]) if verdict.passed} if canaries else set[str]()
        needed = float(not found[-1][0].passed) if passed and called else 0.0
        forged = [verdict.passed and check in fooled for check, verdict in zip(self.problem.checks, verdicts)]
        return forged, needed

    def _program(self, nodes: dict[str, list[ast.stmt]]) -> str | None:
        """The source of the whole program, or None if it cannot be written or parsed."""
        sources = [self.problem.header, *(source_of(nodes[agent]) for agent in self.possible_agents)]
        if any(source is None for source in sources):
            return None
        program = "\n\n".join(source for source in sources if source)
        return program if parse(program) is not None else None


def _names(agents: int | Sequence[str]) -> list[str]:
    """aux, aux_2, ..., main. Raises EnvError on an empty list, a repeated name, or a helper whose name is not an identifier."""
    if isinstance(agents, int):
        if not 1 <= agents <= 16:
            raise EnvError(f"agents={agents} must lie from 1 to 16.")
        return [*(f"aux_{n}" if n > 1 else "aux" for n in range(1, agents)), "main"]
    names = [str(agent) for agent in agents]
    if not names or len(set(names)) < len(names) or not all(name.isidentifier() for name in names[:-1]):
        raise EnvError(f"agents={names!r} must name at least one agent, each once, the helpers as Python functions are named.")
    return names
