"""Poor writers, for pre-training: they retell the text and add stock phrases, up to a random length.

They do not coordinate: length, repetitions and transition words are drawn independently each time, so a team passes the gates
only by chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from collm.envs.quote import Quote
from collm.envs.writing.writing import MARKER, Arxiv, Tldr, Writing
from collm.tiny.workshop.scripted import Chat, play

OPENERS = (
    "also,", "however,", "therefore,", "for example,", "then,", "in fact,", "in short,", "likewise,", "still,", "otherwise,",
    "later,", "to this end,",
)  # fmt: skip
STOCK = {
    "post": (
        "this is a sad story.",
        "i do not know what to do.",
        "i am very angry.",
        "we should talk.",
        "my friend says it is not so bad.",
        "what should i do?",
    ),
    "abstract": (
        "this is a hard problem.",
        "past work is slow.",
        "the method is new and fast.",
        "the method is good for many people.",
        "the error is small.",
        "we need a lot of data and time.",
        "it is easy to use.",
    ),
}
LENGTHS = {  # words: shortest, longest, most likely of the first text and of later ones
    "post": ((4, 40, 8), (4, 40, 10)),
    "abstract": ((70, 230, 130), (70, 230, 135)),
}
_SENTENCE_END = re.compile(r"(?<=[.?!])\s+")


def tldr(rng: random.Random) -> list[Chat]:
    """One to three agents' chats about a post of the train split."""
    return _play(Tldr(wording="terse", agents=rng.choices((1, 2, 3), weights=(2, 10, 1))[0]), rng)


def arxiv(rng: random.Random) -> list[Chat]:
    """One to three agents' chats about an abstract of the train split."""
    return _play(Arxiv(wording="terse", agents=rng.choices((1, 2, 3), weights=(1, 12, 1))[0]), rng)


def quote(rng: random.Random) -> list[Chat]:
    """Two to four writers' chats about a text of the train split. The tiny model is not pre-trained on them."""
    return play(Quote(wording="terse", agents=rng.choice((2, 2, 3, 4)), turns=rng.choice((1, 1, 2))), repeat, rng)


def repeat(env: Quote, agent: str, rng: random.Random) -> str:
    """A run of the text's words, of any length that counts: mostly its beginning, whatever the others do."""
    told = env.text.split()
    start = 0 if rng.random() < 0.6 else rng.randrange(len(told))
    return " ".join(told[start : start + rng.randint(3, env.max_words)])


def retell(env: Writing, role: int, rng: random.Random) -> str:
    """Sentences of the text and stock phrases, up to a length drawn at random."""
    shortest, longest, likely = LENGTHS[env.rules.kind][min(role, 1)]
    length = round(rng.triangular(shortest, longest, likely))
    chosen = _sentences(_SENTENCE_END.split(env.text), STOCK[env.rules.kind], rng)
    joined = rng.choice((0.0, 0.0, 0.1, 0.3, 0.6))
    words: list[str] = []
    while len(words) < length:
        if rng.random() < joined:
            words += rng.choice(OPENERS).split()
        words += next(chosen).split()
    if rng.random() < 0.3:
        words = words[:length]
    return " ".join(words)


def _sentences(told: Sequence[str], stock: Sequence[str], rng: random.Random) -> Iterator[str]:
    """Endless: in order from some sentence on, or at random from a few or from all, with more or fewer stock phrases."""
    few = rng.sample(told, rng.randint(1, len(told)))
    in_order, filler = rng.random() < 0.5, rng.choice((0.0, 0.2, 0.5, 0.8))
    position = rng.choice((0, 0, rng.randrange(len(told))))
    while True:
        if rng.random() < filler:
            yield rng.choice(stock)
        elif in_order:
            yield told[position % len(told)]
            position += 1
        else:
            yield rng.choice(few)


def _play(env: Writing, rng: random.Random) -> list[Chat]:
    observations, _ = env.reset(seed=rng.getrandbits(32))
    texts = [retell(env, role, rng) for role in range(len(env.roles))]
    if env.alone:
        texts = [f"\n{MARKER}\n".join(texts) if rng.random() < 0.8 else " ".join(texts)]
    return [[(observations[agent], text)] for agent, text in zip(env.agents, texts, strict=True)]
