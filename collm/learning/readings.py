"""Readings: a few numbers taken from the texts that one reader may see, as features of a regression; no language model.

    read(first, newest) -> {"number/tests passed": 0.5, "block/share covered": 0.25, "words/repeated": 0.1, ...}

A view is the first and the newest observation of one agent; the view of a critic of several agents is `joined(texts)` of each.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from collm.algorithms.catalogue import load
from collm.errors import TrainingError

Reader = Callable[[str, str], dict[str, float]]
"""(first observation, newest observation) -> name -> finite number."""

MAX_CHARACTERS = 20_000
"""Of each agent's text, only the characters up to here are read."""
MAX_VIEWS = 16
"""Of the texts of several agents, only the first are read."""
MAX_NUMBERS = 16
"""Of all labels, only the first in order of appearance are read."""

PENALTY = 2.5
"""Samples of ridge penalty per column that varies: `TurnRegression(..., strength=0.0, per_feature=PENALTY)`.
docs/results/views.md has the measurement."""

BREAK = "\f"
_TOKEN = re.compile(
    r"(?P<number>(?<![\w.])-?[0-9]{1,12}(?:\.[0-9]{1,12})?(?!\w|\.[0-9]))"
    r"(?:(?: of |/)(?P<total>[0-9]{1,12})(?!\w|\.[0-9]))?"
    r"|(?P<word>[^\W\d]\w*)"
    r"|(?P<end>\n|[.;!?](?!\w))"
    r"|(?P<colon>:)"
    r"|(?P<skipped>[ \t\r\"'`*=%]+)"
    r"|(?P<other>\w+|.)",
    re.DOTALL,
)
_LISTED = re.compile(r"(?: ?, ?|\.\.| |-| ?x ?)-?[0-9]")
_WORD = re.compile(r"[^\W\d_]{4,}")


def joined(texts: Iterable[str]) -> str:
    """The texts of several agents as one text, for `read`."""
    return BREAK.join(text[:MAX_CHARACTERS].replace(BREAK, " ") for text in texts)


def read(first: str, newest: str) -> dict[str, float]:
    """Numbers taken from two texts, the first and the newest observation of one agent, or `joined` ones of several.

    number/LABEL: the labelled numbers of the newest text. "Reward: 0.41" is 0.41 of "reward"; "Tests passed: 2 of 4" is 0.5 of
        "tests passed"; "13 of 13 tests passed" is 1 of "tests passed"; "Need: wood 3 stone 1" is 3 of "need wood" and 1 of
        "need stone". A label is at most three words before the number, else after it. Equal labels are added in one agent's
        text and averaged over agents. Lists of numbers (coordinates, ranges) are left out.
    block/NAME: figure and ground of laid-out blocks: at least three lines of equal length, three characters or more, without
        spaces. A block of the newest text is compared with the block of the same shape in the first one. The ground is the
        character that is most frequent in the first block among those that occur in both.
        covered: cells with figure in both; outside: cells with figure in the newest alone; share covered, share outside: the
        same as fractions of the first block's figure and ground; like neighbours: fraction of 4-adjacent pairs of figure
        that are the same character; kinds: different characters of figure. Blocks of several agents are laid over each other.
    words/repeated: fraction of the first text's different words that occur in the newest text;
        words/new: number of the newest text's different words that do not occur in the first one. Only words of four letters
        or more are counted, which leaves out most function words.

    The newest text of an episode that has just begun equals the first one; it has labelled numbers alone. Time is linear in
    the characters read. Every number is finite.
    """
    firsts, newests = _views(first), _views(newest)
    found = _numbers(newests)
    if newest != first:
        found |= _figures(*([[block for _, block in blocks(text)] for text in texts] for texts in (firsts, newests)))
        found |= _words(" ".join(firsts), " ".join(newests))
    return found


def resolve(name: str, setting: str = "critic.metrics") -> Reader:
    """The reader of a setting's value: "text" is `read`; "module:function" is a function of the user with its arguments.

    Raises ConfigError if it cannot be imported or its return annotation is not dict[str, float].
    """
    return read if name == "text" else load(name, setting, "reader", dict[str, float], "function(first: str, newest: str)")


class Columns(nn.Module):
    """Readings as features: a column for each name, in the order in which `add` met them; a name without a reading is 0.

    The number of columns is fixed, so that regressions on them and checkpoints have a fixed size. Names beyond it are left
    out. A column that never varied gets slope 0 in a regression (`algorithms.regression.Moments`).

    Example: columns.add(readings); regression.learn(columns(readings).view(E, T, -1), returns_ET, chosen_ET)
    """

    names_KB: Tensor
    """(K, B) uint8, UTF-8 of each name, cut to B bytes and filled with zeros; an unused column has zeros alone."""

    def __init__(self, width: int = 24, *, num_bytes: int = 48):
        super().__init__()
        self.width = width
        self.register_buffer("names_KB", torch.zeros(width, num_bytes, dtype=torch.uint8))

    @property
    def names(self) -> list[bytes]:
        """The names seen so far, as they are stored."""
        rows = (bytes(row.tolist()).rstrip(b"\0") for row in self.names_KB)
        return [name for name in rows if name]

    def add(self, readings: Sequence[Mapping[str, float]]) -> None:
        """Give new names a column; the most frequent ones first, then by name."""
        known = self.names
        counts = Counter(self._stored(name) for reading in readings for name in reading)
        new = sorted(counts.keys() - set(known), key=lambda name: (-counts[name], name))
        for k, name in enumerate(new[: self.width - len(known)], start=len(known)):
            self.names_KB[k, : len(name)].copy_(torch.tensor(list(name), dtype=torch.uint8))

    def forward(self, readings: Sequence[Mapping[str, float]]) -> Tensor:
        """Features (S, K) of S readings. Names without a column are left out.

        Raises TrainingError if a number is not finite.
        """
        places = {name: k for k, name in enumerate(self.names)}
        rows_SK = np.zeros((len(readings), self.width), dtype=np.float32)
        for row_K, reading in zip(rows_SK, readings, strict=True):
            for name, value in reading.items():
                if not math.isfinite(value):
                    raise TrainingError(f"the reading {name!r} is {value!r}, not a finite number; mend the reader's function.")
                k = places.get(self._stored(name))
                if k is not None:
                    row_K[k] = value
        return torch.from_numpy(rows_SK)

    def _stored(self, name: str) -> bytes:
        return name.encode(errors="surrogatepass")[: self.names_KB.shape[1]]


def _views(text: str) -> list[str]:
    return [view[:MAX_CHARACTERS] for view in text.split(BREAK, MAX_VIEWS)[:MAX_VIEWS]]


def _numbers(views: Sequence[str]) -> dict[str, float]:
    """Label -> sum over a view, mean over views, of the labels met first."""
    sums: dict[str, float] = {}
    for view in views:
        for label, value in _labelled(view):
            if label in sums or len(sums) < MAX_NUMBERS:
                sums[label] = sums.get(label, 0.0) + value / len(views)
    return {f"number/{label}": value for label, value in sums.items()}


def _labelled(text: str) -> Iterator[tuple[str, float]]:
    """(label, number) in order of appearance."""
    heading: list[str] = []
    words: list[str] = []
    waiting: float | None = None  # a number that no word precedes, whose label may follow
    listed = 0  # the place up to which a list of numbers has been recognized
    for token in _TOKEN.finditer(text + "\n"):
        kind = token.lastgroup
        if kind == "skipped":
            continue
        if kind == "word":
            words.append(token[0].lower())
            continue
        if waiting is not None and words:
            yield _label(words[:3]), waiting
            words = []
        waiting = None
        if kind in ("number", "total"):
            after = _LISTED.match(text, token.end())
            if after:
                listed = after.end()
            elif token.start("number") >= listed:
                value = float(token["number"])
                if token["total"] is not None:
                    value /= max(float(token["total"]), 1.0)
                label = [*heading, *words[-3:]]
                if label:
                    yield _label(label), value
                else:
                    waiting = value
        elif kind == "colon":
            heading = words[-3:]
        elif kind == "end":
            heading = []
        words = []


def _label(words: Sequence[str]) -> str:
    return " ".join(words)[:40]


def blocks(text: str) -> list[tuple[int, list[str]]]:
    """(number of the first line, lines) of laid-out blocks: at least three lines of equal length, three characters or more,
    without spaces."""
    found: list[tuple[int, list[str]]] = []
    run: list[str] = []
    for number, line in enumerate([*text.replace("\r", "").split("\n"), ""]):
        if run and len(line) == len(run[0]) and " " not in line:
            run.append(line)
            continue
        if len(run) >= 3:
            found.append((number - len(run), run))
        run = [line] if len(line) >= 3 and " " not in line else []
    return found


def _shape(block: Sequence[str]) -> tuple[int, int]:
    return len(block), len(block[0])


def _figures(firsts: Sequence[list[list[str]]], newests: Sequence[list[list[str]]]) -> dict[str, float]:
    """Figure-and-ground counts over all blocks; firsts, newests: the blocks of each view."""
    targets = {_shape(block): "".join(block) for blocks in reversed(firsts) for block in reversed(blocks)}
    layers: dict[tuple[int, tuple[int, int]], list[str]] = {}
    for blocks in newests:
        for place, block in enumerate(blocks):
            layers.setdefault((place, _shape(block)), []).append("".join(block))
    if not layers:
        return {}
    covered = outside = figure = ground_cells = alike = pairs = 0
    kinds: set[str] = set()
    for (_, (height, width)), laid in layers.items():
        target = targets.get((height, width), "")
        ground = _ground(target, "".join(laid))
        target = target or ground * (height * width)
        cells = laid[0]
        for layer in laid[1:]:
            cells = "".join(b if a == ground else a for a, b in zip(cells, layer, strict=True))
        both = sum(a != ground != b for a, b in zip(target, cells, strict=True))
        marked = len(cells) - cells.count(ground)
        covered, outside = covered + both, outside + marked - both
        figure, ground_cells = figure + len(target) - target.count(ground), ground_cells + target.count(ground)
        beside = [(a, b) for n, (a, b) in enumerate(pairwise(cells), 1) if n % width]
        touching = [a == b for a, b in (*beside, *zip(cells, cells[width:], strict=False)) if a != ground != b]
        alike, pairs = alike + sum(touching), pairs + len(touching)
        kinds |= set(cells) - {ground}
    return {
        "block/covered": float(covered),
        "block/outside": float(outside),
        "block/share covered": covered / max(figure, 1),
        "block/share outside": outside / max(ground_cells, 1),
        "block/like neighbours": alike / max(pairs, 1),
        "block/kinds": float(len(kinds)),
    }


def _ground(first: str, newest: str) -> str:
    """The most frequent character of the first text among those of both; of the newest if none is."""
    shared = set(first) & set(newest)
    counts = Counter(character for character in first if character in shared) or Counter(newest)
    return max(sorted(counts), key=counts.__getitem__)


def _words(first: str, newest: str) -> dict[str, float]:
    before, after = (set(_WORD.findall(text.lower())) for text in (first, newest))
    return {"words/repeated": len(before & after) / max(len(before), 1), "words/new": float(len(after - before))}
