"""Words: splitting a text into words, stop words, and transition words in categories."""

from __future__ import annotations

import re
from typing import Literal

Matching = Literal["word", "substring"]

_WORD = re.compile(r"\b\w+\b")

_STOP_WORDS = """
a about above after again against all also am an and any are as at be because been before being below between both but
by can could did do does doing done down during each either else ever every few for from further get got had has have
having he her here hers herself him himself his how i if in into is it its itself just least less let like many may me
might mine more most much must my myself neither no nor not now of off often on once one only or other others our ours
ourselves out over own perhaps quite rather s same shall she should since so some such t than that the their theirs them
themselves then there these they this those though through thus to too under until up upon us very was we were what when
where whether which while who whom whose why will with within without would yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

TRANSITIONS: dict[str, tuple[str, ...]] = {
    "addition": ("also", "additionally", "besides", "furthermore", "moreover", "in addition", "as well as"),
    "contrast": ("but", "however", "yet", "instead", "whereas", "in contrast", "on the other hand", "rather than"),
    "cause": ("because", "since", "so", "thus", "therefore", "hence", "consequently", "as a result", "due to"),
    "example": ("for example", "for instance", "such as", "namely", "including"),
    "sequence": ("first", "firstly", "second", "secondly", "third", "next", "then", "finally", "lastly"),
    "emphasis": ("indeed", "in fact", "especially", "particularly", "notably", "clearly", "certainly", "above all"),
    "summary": ("overall", "in short", "in summary", "to sum up", "in conclusion", "all in all", "briefly"),
    "comparison": ("similarly", "likewise", "equally", "in the same way", "compared to", "compared with", "just like"),
    "concession": ("although", "though", "despite", "in spite of", "nevertheless", "nonetheless", "still", "admittedly"),
    "condition": ("if", "unless", "otherwise", "provided that", "as long as", "in case", "whether"),
    "time": ("when", "while", "before", "after", "afterwards", "meanwhile", "later", "until", "eventually", "soon"),
    "purpose": ("in order to", "to this end", "for this purpose", "for this reason", "with the aim of", "aiming to", "lest"),
}
"""Twelve categories of transition phrases. No phrase of one category contains a phrase of another as whole words."""


def words(text: str) -> list[str]:
    """The lower-cased words, in order: runs of letters, digits and underscores of any script."""
    return _WORD.findall(text.lower())


def jaccard(first: set[str], second: set[str]) -> float:
    """Jaccard index of two sets of words without stop words: |intersection| / |union|. It is 1 for two empty sets."""
    first, second = first - STOP_WORDS, second - STOP_WORDS
    union = len(first | second)
    return len(first & second) / union if union else 1.0


def transition_categories(text: str, matching: Matching = "word") -> set[str]:
    """Categories with at least one phrase in the text: as whole words ("word") or anywhere ("substring": "so" in "some")."""
    if matching == "substring":
        searched, mark = text.lower(), ""
    else:
        searched, mark = f" {' '.join(words(text))} ", " "
    return {name for name, phrases in TRANSITIONS.items() if any(mark + phrase + mark in searched for phrase in phrases)}
