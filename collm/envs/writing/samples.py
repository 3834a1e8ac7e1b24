"""Built-in posts and abstracts, so that writing needs no download: plain sentences of a few hundred short words.

A text is one choice per slot of a template, so each text has a number in mixed radix. Tasks are numbers drawn without
replacement: no two tasks, and no two splits, share a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Literal

from collm import seeds

Kind = Literal["post", "abstract"]

NUM_TASKS = {"train": 2048, "eval": 256}

PEOPLE = ("boss", "sister", "brother", "friend", "mom", "dad", "roommate", "neighbor")
EVENTS = (  # what happened, what followed, what to do
    ("hit a tree with my car", "now the car does not start", "fix the car"),
    ("let my dog run away", "now the dog is lost", "look for the dog"),
    ("broke my new phone", "now the phone is dead", "buy a phone"),
    ("did not pay the rent", "now the rent is late", "pay the rent"),
    ("ate my birthday cake", "now the cake is gone", "bake a cake"),
    ("lied about my job", "now the job is at risk", "find a job"),
    ("lost my house keys", "now the door is locked", "change the lock"),
    ("sold my old bike", "now i have to walk", "get the bike back"),
    ("yelled at my cat", "now the cat hides all day", "keep the cat"),
    ("saw me cheat on a test", "now the test does not count", "take the test again"),
    ("took my gold ring", "now the ring is stolen", "ask for the ring"),
    ("killed all my plants", "now the plants are brown", "grow more plants"),
    ("played loud music", "now i can not sleep", "stop the music"),
    ("asked me for money", "now the money is spent", "forget the money"),
    ("came late to my wedding", "now the photos look bad", "send the photos"),
    ("spilled milk on my laptop", "now the laptop smells", "clean the laptop"),
)
WHEN = ("last night", "last week", "last year", "this morning", "on monday", "in june")
WHERE = ("at home", "at work", "at school", "at a party", "in the park", "on a trip")
FELT = ("was very sad", "was very angry", "felt sick", "started to cry", "said nothing", "did not know why")
EXCUSE = (
    "it is my fault",
    "it is just a joke",
    "it was an accident",
    "it is not so bad",
    "i should calm down",
    "i want too much",
)
TRIED = ("tried to talk", "asked for help", "sent a text", "made a plan", "went for a walk", "waited all day")
FAILED = ("it did not help", "nobody cares", "we just fight", "i got no answer", "it made things worse", "i am still upset")
ADVICE = ("thinks i am right", "thinks i am wrong", "does not care", "laughed at me", "told me to wait", "says we should talk")
ELSE = ("let it go", "say sorry", "move out", "wait a week", "call the police", "tell the truth")

FIELDS = ("robots", "plants", "stars", "cells", "cities", "rivers", "games", "drugs", "storms", "markets", "birds", "cars")
TRAITS = ("speed", "growth", "cost", "size", "heat", "noise", "age", "shape")
MODELS = ("graph", "tree", "filter", "code", "wave", "memory", "clock", "map")
SOURCES = ("images", "texts", "records", "sensors", "videos", "surveys")
IMPORTANCE = (
    "the {trait} of {field} is hard to predict, but it matters in daily life.",
    "we know little about the {trait} of {field}, but many people need it.",
    "many people study the {trait} of {field}, but it is hard to predict.",
)
GAP = (
    "past work is slow, because it needs a lot of data and time.",
    "past work is not good when the data is small and old.",
    "most methods are slow, and they need a lot of data and time.",
)
NEWS = (
    "in this work we show a new method for this problem.",
    "in this work we study a new method to predict the {trait}.",
    "we show a new method that is fast and needs little data.",
)
STEPS = (
    "first, the method uses a {model} to learn from {source}. then, it uses the {model} to find the best answer.",
    "first, the method turns {source} into a {model}. then, it uses the {model} to predict the {trait}.",
    "first, we learn a {model} from many {source}. then, the {model} is used to find the best answer.",
)
PROOF = (
    "we test the method on new {source} of {field} and compare it with past work.",
    "we compare the method with past work on a lot of new {source} of {field}.",
    "the method is tested on new {source} of {field}, and it is easy to use.",
)
RESULT = (
    "as a result, the error is small and the method is fast.",
    "as a result, the method is good and the error is small.",
    "the error is small, so the method is good for many people.",
)
TIMES = ("two", "three", "four", "five", "six", "ten")
LIMIT = (
    "however, it does not work when the {source} are old.",
    "however, it needs more time when the {source} are small.",
    "however, it is still hard to learn from a few {source}.",
)
END = (
    "in short, the method helps many people to predict the {trait} of {field} in daily life.",
    "in short, a {model} is a good way to learn the {trait} of {field} from {source}.",
    "in short, we show that the {trait} of {field} is not so hard to predict.",
)

_POST: tuple[Sequence[object], ...] = (EVENTS, PEOPLE, PEOPLE[1:], WHEN, WHERE, FELT, EXCUSE, TRIED, FAILED, ADVICE, ELSE)
_SENTENCES = (IMPORTANCE, GAP, NEWS, STEPS, PROOF, RESULT, TIMES, LIMIT, END)
_ABSTRACT: tuple[Sequence[object], ...] = (FIELDS, TRAITS, MODELS, SOURCES, *_SENTENCES)


@cache
def sample_texts(kind: Kind, split: str) -> tuple[str, ...]:
    """All texts of one split, "train" (2048) or "eval" (256)."""
    write, slots = (_post, _POST) if kind == "post" else (_abstract, _ABSTRACT)
    sizes = [len(slot) for slot in slots]
    drawn = seeds.stream("writing", kind).sample(range(prod(sizes)), sum(NUM_TASKS.values()))
    held_out = NUM_TASKS["eval"]
    numbers = drawn[:held_out] if split == "eval" else drawn[held_out:]
    return tuple(write(*_digits(number, sizes)) for number in numbers)


def _digits(number: int, sizes: Sequence[int]) -> list[int]:
    digits = []
    for size in sizes:
        number, digit = divmod(number, size)
        digits.append(digit)
    return digits


def _post(event: int, who: int, other: int, when: int, where: int, felt: int, excuse: int, *rest: int) -> str:
    """A post of 48 to 60 words: an accident, how all took it, and a question."""
    happened, followed, wish = EVENTS[event]
    person, third = PEOPLE[who], PEOPLE[(who + 1 + other) % len(PEOPLE)]
    tried, failed, advice, instead = (slot[digit] for slot, digit in zip((TRIED, FAILED, ADVICE, ELSE), rest, strict=True))
    return (
        f"my {person} {happened} {WHEN[when]}. we were {WHERE[where]} and i {FELT[felt]}. {followed}. "
        f"my {person} says {EXCUSE[excuse]}. i {tried}, but {failed}. my {third} {advice}. should i {wish} or {instead}?"
    )


def _abstract(field: int, trait: int, model: int, source: int, *rest: int) -> str:
    """An abstract of about 120 words: the problem, the gap, a method, its proof and its limits."""
    chosen = (slot[digit] for slot, digit in zip(_SENTENCES, rest, strict=True))
    importance, gap, news, steps, proof, result, times, limit, end = chosen
    example = f"for example, it is {times} times as fast as past work."
    text = " ".join((importance, gap, news, steps, proof, result, example, limit, end))
    return text.format(field=FIELDS[field], trait=TRAITS[trait], model=MODELS[model], source=SOURCES[source])
