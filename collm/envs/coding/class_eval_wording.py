"""The observations of `class_eval`, in two wordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.coding.class_eval import ClassEval

SHOWN_FAILURES = 5
NOTHING = "You have no method to write. Answer: pass"


def _plain_first(env: ClassEval, agent: str) -> str:
    number = len(env.possible_agents)
    role = "" if number == 1 else f", one of {number} programmers of this class. Each writes its own methods"
    return "\n".join([env.problem.skeleton, "", f"You are {agent}{role}.", *_imperative(env, agent)])


def _plain_later(env: ClassEval, agent: str, unread: Sequence[str], written: Sequence[str], passed: Sequence[bool]) -> str:
    told = _told(env, agent, unread, written, passed) if env.feedback == "level" else []
    return "\n".join([*told, *_imperative(env, agent)])


def _imperative(env: ClassEval, agent: str) -> list[str]:
    own = env.owned[agent]
    if not own:
        return [NOTHING]
    others = "" if len(env.possible_agents) == 1 else " Call the others as self.name(...)."
    return [
        f"Write only your methods with their bodies: {', '.join(own)}.{others} A method is, for example:",
        "def last(self):\n    return self.items[-1]",
        f"Write Python code without the class line. It must begin with: def {own[0]}(self",
    ]


def _terse_first(env: ClassEval, agent: str) -> str:
    number, own = len(env.possible_agents), env.owned[agent]
    if number == 1:
        lines = [f"You are {agent}. Write the methods of this Python class."]
    else:
        lines = [f"You are {agent}, one of {number} programmers of this Python class. Each writes its own methods."]
    lines.append(env.problem.skeleton)
    if not own:
        return "\n".join([*lines, NOTHING])
    lines.append(f"Your methods: {', '.join(own)}")
    if number > 1:
        lines.append("Write only these. The others are written by your team; call them as self.name(...).")
    return "\n".join([*lines, "Answer with Python code only: def lines with bodies, no class line, no constructor."])


def _terse_later(env: ClassEval, agent: str, unread: Sequence[str], written: Sequence[str], passed: Sequence[bool]) -> str:
    again = "Write all your methods again, better." if env.owned[agent] else NOTHING
    return "\n".join([*(_told(env, agent, unread, written, passed) if env.feedback == "level" else []), again])


def _told(env: ClassEval, agent: str, unread: Sequence[str], written: Sequence[str], passed: Sequence[bool]) -> list[str]:
    """Whether the answers could be read, what is missing, and the failed tests of the agent's own methods."""
    own, tests = env.owned[agent], env.problem.tests
    lines = []
    if agent in unread:
        lines.append("Your answer is no Python.")
    elif env.program is None:
        lines.append("The class cannot be read: the answer of a team-mate is no Python.")
    missing = [name for name in own if name not in written]
    if missing and agent not in unread:
        lines.append(f"You left out: {', '.join(missing)}.")
    lines.append(f"{sum(passed)} of {len(passed)} hidden tests passed.")
    failed = [test.name for test, good in zip(tests, passed) if not good and test.method in own]
    if failed and env.program is not None:
        lines.append(f"Failed tests of your methods: {', '.join(failed[:SHOWN_FAILURES])}")
    return lines


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
