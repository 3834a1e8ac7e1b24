"""Settings of a team written into a chat template: its system message, and whether the model thinks.

The result is a template of its own, which a saved agent keeps: whatever renders it later makes the prompts of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from collm.errors import ConfigError

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates let a caller choose whether the model thinks."""
START = "{{ '' }}"
"""Keeps the white space that follows: Jinja drops a line break, or spaces at a line's start, next to a block tag."""

_BREAK = "\n"
"""Jinja drops one at the end of a template."""

Render = Callable[[str, Sequence[str], bool], list[str]]
"""(template, roles, answer) -> the len(roles) + 1 texts before, between and after messages of these roles."""


def adapted(template: str, render: Render, tokenizer: Any, *, system: str | None, thinking: str | None) -> str:
    """A tokenizer's template under `team.system` and `team.thinking`; the template itself where they do not change it.

    thinking: None leaves the template's own choice. Raises ConfigError where the template cannot do what `system` asks for.
    """
    given = "false" if thinking == "off" else "true"
    template = "".join(
        f"{{%- if {switch} is not defined %}}{{%- set {switch} = {given} %}}{{%- endif %}}{START}"
        for switch in SWITCHES
        if thinking is not None and re.search(rf"\b{switch}\b", template)
    ) + template  # fmt: skip
    if system is None:
        return template
    if system == "none":
        return _without_system(template, render, tokenizer)
    return _with_system(template, render, tokenizer, system)


def _with_system(template: str, render: Render, tokenizer: Any, system: str) -> str:
    """The template with a system message at the head of every chat that does not begin with one."""
    message = f"[{{'role': 'system', 'content': {json.dumps(system, ensure_ascii=False)}}}]"
    changed = f"{{%- if messages[0]['role'] != 'system' %}}{{%- set messages = {message} + messages %}}{{%- endif %}}{START}"
    changed += template
    try:
        shown = render(changed, ("user",), True)[0]
        if shown.count(system.strip()) != 1:
            raise ConfigError("it does not show them as they are")
    except ConfigError as error:
        raise ConfigError(
            f"team.system={system[:60]!r}: the chat template of {tokenizer.name_or_path!r} has no place for system messages "
            f"({error}). Leave it out and put the text into the environment's observations, or choose another model."
        ) from error
    return changed


def _without_system(template: str, render: Render, tokenizer: Any) -> str:
    """The template without what it puts before the first question, a default system message; its begin-of-text token stays.

    What opens a question is found by comparison: between an answer and the next question stand the end of the answer, which
    also follows the last answer of a chat, and the opening.
    """
    roles = ("user", "assistant", "user")
    before, answered, between, _ = render(template, roles, True)
    opening = between.removeprefix(render(template, roles[:2], False)[-1])
    head = before.removesuffix(opening)
    bos, text = tokenizer.bos_token or "", head
    for token in tokenizer.get_added_vocab():
        text = text.replace(token, "")
    if not text.strip():
        return template
    wanted = (bos if bos and head.startswith(bos) and not opening.startswith(bos) else "") + opening
    first, mark = json.dumps(wanted, ensure_ascii=False), json.dumps(opening, ensure_ascii=False)
    changed = (
        f"{{%- set rendered %}}{START}{template.removesuffix(_BREAK)}{START}{{%- endset %}}"
        f"{{%- if messages[0]['role'] == 'user' %}}{{{{- {first} + rendered.split({mark}, 1)[1] -}}}}"
        "{%- else %}{{- rendered -}}{%- endif %}"
    )
    found = opening.strip() and head != before
    if not found or render(changed, roles, True)[:3] != [wanted, answered, between]:
        raise ConfigError(
            f"team.system='none': what the chat template of {tokenizer.name_or_path!r} puts before the first question, "
            f"{before[:60]!r}, cannot be told from what opens every question. Leave team.system out, or set a text."
        )
    return changed
