"""Words that readers of this field could not look up are not used: docs, comments, docstrings, settings and messages."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

INSTEAD = {
    r"worlds?": "environment",
    r"lets? expect": "predicts",
    r"own numbers": "environment metrics",
    r"yardsticks?": "metric ceiling",
    r"imagin(?:e|es|ed|ing)": "no-op counterfactual, replayed",
    r"silen(?:t|tly|ce)": "no-op, empty answer",
    r"is no (?!longer|more|less|other)[a-z]+": "is not a ...",
}
"""What is refused (as a whole word, in any case) -> what the glossary has instead."""
BANNED = re.compile(rf"\b(?:{'|'.join(INSTEAD)})\b", re.IGNORECASE)
QUOTED = re.compile(r"```.*?```|`[^`]*`|\"[^\"\n]*\"|'[^'\n ]*'|(?<=[\"\s(.])world(?=[=\"']| = |: \")", re.DOTALL)
"""Code, quoted values and the option `world` keep their own words."""

DOCS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "recipes/**/*.toml", "collm/**/*.toml", "Makefile")
    for path in ROOT.glob(pattern)
    if ".venv" not in path.parts
)
TEXTS = {"quote_texts.py", "samples.py", "class_samples.py"}
"""What models read as data, which keeps its own words; so do the observations in `PROMPTS`, since no prompt changes."""
PROMPTS = {"Your answer is no Python.", "The class cannot be read: the answer of a team-mate is no Python."}
CODE = sorted(
    path
    for folder in ("collm", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if path.name not in TEXTS and ".work" not in path.parts
)


def found_in_text(text: str) -> list[str]:
    """The refused expressions of a text, outside quotes."""
    return [match[0] for match in BANNED.finditer(QUOTED.sub(" ", text))]


def prose(source: str) -> Iterator[tuple[int, str]]:
    """(line, text) of every comment, docstring and message in Python source: strings of several words."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and " " in node.value.strip()
            and node.value not in PROMPTS
        ):
            yield node.lineno, node.value


def found_in_code(source: str) -> list[str]:
    return [f"line {line}: {word}" for line, text in prose(source) for word in found_in_text(text)]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docs_use_the_words_of_the_field(path: Path) -> None:
    assert found_in_text(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_comments_docstrings_and_messages_use_the_words_of_the_field(path: Path) -> None:
    assert found_in_code(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "planted",
    [
        "The world is reset.", "what the numbers let expect", "it lets expect more", "the world's own numbers", "the yardstick",
        "an imagined turn", "had the agent been silent", "its silence", "this is no agent",
    ],
)  # fmt: skip
def test_a_planted_word_is_found(planted: str) -> None:
    assert found_in_text(planted)
    assert found_in_code(f'"""{planted}"""\n')
    assert found_in_code(f"# {planted}\n")
    assert found_in_code(f'raise ValueError(f"{planted} {{1}}")\n')


@pytest.mark.parametrize(
    "allowed", ["`world` is an option", 'Set world = "persistent".', "it is no longer there", 'the file "imagined turns"']
)
def test_quoted_values_and_the_option_are_allowed(allowed: str) -> None:
    assert found_in_text(allowed) == []
