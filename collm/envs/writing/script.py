"""The scripted player of the writing environments."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from collm.envs.writing.lexicon import TRANSITIONS, words

OPENERS = tuple(phrases[0] for phrases in TRANSITIONS.values())
"""One transition phrase of every category."""


def chain(source: str, number: int, tokens: tuple[int, int], length: float, distinct: float) -> list[str]:
    """`number` texts of the source's words, each longer than the one before.

    The first has tokens[0] whitespace tokens, the others at most tokens[1]. Each has at least `length` times the characters
    and, where the source has enough words, `distinct` times the distinct words of the one before it.
    """
    told = source.split()
    made = [" ".join(itertools.islice(itertools.cycle(told), tokens[0]))]
    while len(made) < number:
        made.append(_longer(told, made[-1], tokens[1], length, distinct))
    return made


def _longer(told: list[str], before: str, most: int, length: float, distinct: float) -> str:
    fewest, enough = 1.05 * length * len(before), distinct * len(set(words(before)))
    every = max(2, round(fewest / len(before) * len(before.split()) / len(OPENERS)))
    text = ""
    for phrase in _mixed(told, every):
        longer = f"{text} {phrase}".strip()
        done = len(text) >= fewest and (len(set(words(text))) >= enough or len(text) >= 1.5 * fewest)
        if done or len(longer.split()) > most:
            break
        text = longer
    return text


def _mixed(told: list[str], every: int) -> Iterator[str]:
    """The words, over and over, with a transition phrase before each `every` of them."""
    openers = itertools.cycle(OPENERS)
    for place, word in enumerate(itertools.cycle(told)):
        if place % every == 0:
            yield next(openers)
        yield word
