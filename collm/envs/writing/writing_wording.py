"""The observations of `tldr` and `arxiv`, in two wordings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.writing.writing import Writing

MARKER = "[PARAGRAPH_SPLIT]"
BEGINNINGS = {"post": "The writer", "abstract": "This paper"}
"""Kind of source -> how a text begins."""


def _plain_first(env: Writing, agent: str) -> str:
    rules, kind, number = env.rules, env.rules.kind, len(env.roles)
    low, high = rules.tokens
    lines = [*(line for line in env.text.splitlines() if line.strip()), ""]
    if env.alone:
        lines.append(f"You are {agent}. You write {number} texts about this {kind}, with {MARKER} between them.")
        lines += [_assignment(env, index) for index in range(number)]
        task = f"{number} texts about the {kind}, with the line {MARKER} between them. Each has"
    else:
        lines.append(f"You are {agent}, one of {number} writers. Each writes one text about this {kind}.")
        index = env.roles.index(agent)
        lines.append(_assignment(env, index))
        task = f"{rules.roles[index][1]} of the {kind} in plain words. It has"
    lines += ["", f"Write {task} {low} to {high} words and uses words of the {kind}. It must begin with: {BEGINNINGS[kind]}"]
    return "\n".join(lines)


def _terse_first(env: Writing, agent: str) -> str:
    kind, number = env.rules.kind, len(env.roles)
    if env.alone:
        lines = [f"You are {agent}. Write {number} texts about the {kind}, with {MARKER} between them."]
    else:
        lines = [f"You are {agent}, one of {number} writers. Each writes one text about the {kind}."]
    lines += [f"The {kind}:", *(f"> {line}" for line in env.text.splitlines() if line.strip())]
    lines += [_assignment(env, index) for index, role in enumerate(env.roles) if env.alone or role == agent]
    low, high = env.rules.tokens
    lines += [
        f"Use words of the {kind}.",
        f"{'Each text has' if env.alone else 'Write'} {low} to {high} words. Plain text only.",
    ]
    return "\n".join(lines)


def _later(env: Writing, agent: str, total: float) -> str:
    """An episode has one turn, so nothing is to be answered."""
    return f"Reward: {total:.2f} of 3."


def _assignment(env: Writing, index: int) -> str:
    """The description of the text of role `index`, and its ratios to the texts of its neighbours."""
    rules = env.rules
    whose = f"Text {index + 1}" if env.alone else "Your text"
    lines = [f"{whose} is {rules.roles[index][1]}."]
    if index > 0:
        before = "text 1" if env.alone else f"the text of {env.roles[index - 1]}"
        lines.append(f"Compared with {before} it is {rules.hint}.")
    if index + 1 < len(env.roles) and not env.alone:
        lines.append(f"Compared with yours the text of {env.roles[index + 1]} is {rules.hint}.")
    if index > 0 or rules.transitions_in_both:
        lines.append("Use many transition words: also, however, so, for example.")
    return " ".join(lines)


PLAIN = Texts(_plain_first, _later)
TERSE = Texts(_terse_first, _later)
