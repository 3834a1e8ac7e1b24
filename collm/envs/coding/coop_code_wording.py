"""The observations of `coop_code`, in two wordings."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING

from collm.envs.coding.programs import Use
from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.coding.coop_code import CoopCode


def _plain_first(env: CoopCode, agent: str) -> str:
    entry_point, number = env.problem.entry_point, len(env.possible_agents)
    lines = ["Problem:", env.problem.prompt, ""]
    if number == 1:
        lines.append(f"You are {agent} and write the Python function {entry_point}.")
    elif agent == env.main:
        helpers = ", ".join(env.helpers)
        writers = "others" if number > 2 else "the other"
        lines.append(
            f"You are {agent}, one of {number} programmers. You write {entry_point}, which calls {helpers}, written now by "
            f"{writers}, and does more with the result."
        )
    else:
        lines.append(f"You are {agent}, one of {number} programmers. {env.main} writes {entry_point} now and calls {agent}.")
    return "\n".join([*lines, _imperative(env, agent)])


def _plain_later(env: CoopCode, agent: str, passed: float, use: Use) -> str:
    told = _told(env, agent, passed, use) if env.feedback == "level" else ""
    return f"{told}\n\n{_imperative(env, agent)}".lstrip()


def _imperative(env: CoopCode, agent: str) -> str:
    helps = agent in env.helpers
    name = agent if helps else env.problem.entry_point
    step = " that does a step of the problem" if helps else ""
    return (
        f"An answer is, for example: def {name}(xs): return xs[1:]\n\n"
        f"Write one Python function named {name}{step}. It must begin with: def {name}("
    )


def _terse_first(env: CoopCode, agent: str) -> str:
    entry_point, number = env.problem.entry_point, len(env.possible_agents)
    if number == 1:
        lines = [f"You are {agent}. Write the Python function {entry_point}."]
    elif agent == env.main:
        helpers = ", ".join(env.helpers)
        lines = [
            f"You are {agent}, one of {number} programmers. Write the Python function {entry_point}.",
            f"Call {helpers}, written now by {'others' if number > 2 else 'the other'}, and do more with the result.",
        ]
    else:
        lines = [
            f"You are {agent}, one of {number} programmers. Write one Python function named {agent} that helps.",
            f"{env.main} writes {entry_point} now and calls {agent}.",
        ]
    return "\n".join([*lines, "Problem:", env.problem.prompt, "Answer Python code only."])


def _terse_later(env: CoopCode, agent: str, passed: float, use: Use) -> str:
    if env.feedback == "plain":
        return "Revise your function. Answer Python code only."
    return f"{_told(env, agent, passed, use)}\nRevise your function. Answer Python code only."


def _told(env: CoopCode, agent: str, passed: float, use: Use) -> str:
    """The parts earned, the tests passed and, for main, how it uses the helpers."""
    total = len(env.problem.checks)
    lines = []
    if env.helpers:
        lines.append(f"Helper functions: {'ok' if env.parts.get('helpers', 0.0) > 0.39 else 'missing'}.")
    lines.append(f"{env.problem.entry_point}: {'ok' if 'entry' in env.parts else 'missing'}.")
    if "entry" in env.parts:
        lines.append("The program parses." if "parse" in env.parts else "The program does not parse.")
    if "tests" in env.parts:
        lines.append(f"Tests passed: {round(passed * total)} of {total}.")
        lines += [f"A test ended with {_kind(error)}." for error in env.errors[: env.slice]]
    return " ".join(lines) + (_notes(env, use) if agent == env.main and "tests" in env.parts else "")


def _notes(env: CoopCode, use: Use) -> str:
    """The feedback to main about its use of the helpers."""
    if not env.helpers:
        return ""
    if not use.calls:
        return f" You do not call {' or '.join(env.helpers)}."
    if use.ignored:
        return " You ignore what comes back."
    return " You only pass the call on: do more." if use.thin else ""


def _kind(error: str) -> str:
    """The type of an error if it is built into Python, without the message, which a team-mate's code may have written."""
    first = error.split(":")[0].strip()
    if first.startswith(("timeout", "not run", "killed")):
        return "a time-out" if first.startswith("timeout") else "its process killed" if first.startswith("killed") else "no run"
    known = getattr(builtins, first, None)
    return first if isinstance(known, type) and issubclass(known, BaseException) else "an error"


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
