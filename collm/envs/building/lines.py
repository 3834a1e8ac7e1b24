"""Answers that are commands, one per line."""

from __future__ import annotations

import re

_FENCE = re.compile(r"```[a-z]{0,20}", re.ASCII)


def command_lines(answer: str) -> list[str]:
    """The lines of an answer, stripped, without blank lines and code fences."""
    lines = (line.strip() for line in answer.split("\n"))
    return [line for line in lines if line and not _FENCE.fullmatch(line)]
