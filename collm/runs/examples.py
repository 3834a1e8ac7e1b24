"""Files of chats as JSON lines: worked examples of a run, and a user's data for `collm imitate`.

    {"agent": "first", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

"agent" may be absent: the chat is every agent's. "task" may name the training task that the chat was drawn from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from collm.errors import ConfigError
from collm.runs.directory import EXAMPLES
from collm.runs.files import write_text
from collm.types import Example, Message, encodable, examples_of

ROLES = ("user", "assistant")


def read_examples(path: Path, agents: Sequence[str] = ()) -> tuple[Example, ...]:
    """The chats of a file. Raises ConfigError naming file and line.

    agents: names that a chat's "agent" must be one of; any, if empty.
    """
    if not path.is_file():
        raise ConfigError(f"examples {str(path)!r} cannot be read: no file is there. Name a file of chats, as JSON lines.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"examples {str(path)!r} cannot be read: {error}.") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                examples.append(_parse(json.loads(line), agents))
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"examples {str(path)!r}, line {number}: {error}. A line is one chat: "
                    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
                ) from error
    if not examples:
        raise ConfigError(f"examples {str(path)!r} holds no chat. Write one chat a line, as JSON.")
    return tuple(examples)


def _parse(chat: Any, agents: Sequence[str]) -> Example:
    """One parsed line. Raises ValueError."""
    if not isinstance(chat, dict) or not isinstance(chat.get("messages"), list):
        raise ValueError("it has no list 'messages'")
    agent, task = chat.get("agent"), chat.get("task")
    if agent is not None and (not isinstance(agent, str) or (agents and agent not in agents)):
        raise ValueError(f"agent {str(agent)[:60]!r} is not one of {', '.join(agents) or 'the agents, which are names'}")
    if task is not None and type(task) is not int:
        raise ValueError("'task' is not a whole number")
    messages = []
    for index, message in enumerate(chat["messages"]):
        if not isinstance(message, dict) or message.get("role") != ROLES[index % 2]:
            raise ValueError(f"message {index} must have the role {ROLES[index % 2]!r}, since user and assistant take turns")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} has no text 'content'")
        messages.append(Message(message["role"], encodable(message["content"])))
    if not messages or len(messages) % 2:
        raise ValueError("the last message must be the assistant's")
    return Example(tuple(messages), agent, task)


def write_examples(folder: Path, examples: Iterable[Example]) -> None:
    """Record examples in a run directory or an exported folder; without examples nothing is written. Raises SaveError."""
    lines = []
    for example in examples:
        named = {"agent": example.agent, "task": example.task}
        messages = [{"role": message.role, "content": message.text} for message in example.messages]
        lines.append(json.dumps({**{k: v for k, v in named.items() if v is not None}, "messages": messages}) + "\n")
    if lines:
        write_text(folder / EXAMPLES, "".join(lines))


def recorded_examples(folder: Path) -> tuple[Example, ...]:
    """The examples of a run directory or an exported folder. Raises ConfigError for a damaged file."""
    return read_examples(folder / EXAMPLES) if (folder / EXAMPLES).is_file() else ()


def of_agent(examples: Iterable[Example], agent: str) -> tuple[Example, ...]:
    """The examples that an agent reads, without its name, for a folder that holds one agent."""
    return tuple(replace(example, agent=None) for example in examples if example.agent in (None, agent))


def with_examples(examples: Iterable[Example], agent: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """A request's messages with the agent's examples in front, after a system message, unless they begin with them already."""
    shown = examples_of(examples, agent)
    head = 1 if messages and messages[0].role == "system" else 0
    begun = messages[head : head + len(shown)]
    if [(m.role, m.text) for m in begun] == [(m.role, m.text) for m in shown]:
        return tuple(messages)
    return (*messages[:head], *shown, *messages[head:])
