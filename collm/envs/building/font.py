"""A 5x5 pixel font of the 26 capital letters, and the word lists that StrBuild draws from."""

from __future__ import annotations

from functools import cache
from importlib import resources

from collm import seeds
from collm.errors import EnvError

SIZE = 5
GAP = 2

_ROWS = """
A 01110 10001 11111 10001 10001
B 11110 10001 11110 10001 11110
C 01111 10000 10000 10000 01111
D 11110 10001 10001 10001 11110
E 11111 10000 11110 10000 11111
F 11111 10000 11110 10000 10000
G 01111 10000 10011 10001 01111
H 10001 10001 11111 10001 10001
I 11111 00100 00100 00100 11111
J 00111 00010 00010 10010 01100
K 10001 10010 11100 10010 10001
L 10000 10000 10000 10000 11111
M 10001 11011 10101 10001 10001
N 10001 11001 10101 10011 10001
O 01110 10001 10001 10001 01110
P 11110 10001 11110 10000 10000
Q 01110 10001 10101 10010 01101
R 11110 10001 11110 10010 10001
S 01111 10000 01110 00001 11110
T 11111 00100 00100 00100 00100
U 10001 10001 10001 10001 01110
V 10001 10001 10001 01010 00100
W 10001 10001 10101 11011 10001
X 10001 01010 00100 01010 10001
Y 10001 01010 00100 00100 00100
Z 11111 00010 00100 01000 11111
"""

GLYPHS: dict[str, tuple[str, ...]] = {line.split()[0]: tuple(line.split()[1:]) for line in _ROWS.strip().splitlines()}


def width(word: str) -> int:
    """Columns of a word: 5, 12, 19, 26 for 1..4 letters."""
    return len(word) * (SIZE + GAP) - GAP


@cache
def cells(word: str) -> frozenset[tuple[int, int]]:
    """Filled cells (x, y) of a word, x to the right from 0, y up from 0. Raises EnvError for characters other than A-Z."""
    if not word or any(letter not in GLYPHS for letter in word):
        raise EnvError(f"string {word!r} cannot be built; use one or more letters A-Z.")
    return frozenset(
        (index * (SIZE + GAP) + column, SIZE - 1 - row)
        for index, letter in enumerate(word)
        for row, bits in enumerate(GLYPHS[letter])
        for column, bit in enumerate(bits)
        if bit == "1"
    )


@cache
def english_words() -> tuple[str, ...]:
    """About 700 common English words of 2 to 4 letters, in a fixed shuffled order that keeps splits stable."""
    text = (resources.files("collm.envs.building") / "words.txt").read_text(encoding="utf-8")
    return tuple(sorted(set(text.upper().split()), key=lambda word: seeds.derive("words", word)))


def split_words(split: str, lengths: tuple[int, ...]) -> list[str]:
    """English words of the given lengths: the first 35 % of each length are "eval", the others "train"."""
    chosen: list[str] = []
    for length in lengths:
        words = [word for word in english_words() if len(word) == length]
        held_out = round(0.35 * len(words))
        chosen += words[:held_out] if split == "eval" else words[held_out:]
    return chosen
