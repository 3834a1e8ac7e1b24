"""Learned effects: what a line of an answer changes in the next observation, counted over earlier iterations.

Nothing is replayed. For answers of lines (commands) and observations with laid-out blocks, such as a grid of cells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from collm.learning.batch import Batch
from collm.learning.features import Point, points_of
from collm.learning.readings import blocks
from collm.types import Counterfactual, Turn

LINES, CELLS, BYTES = 512, 512, 48
"""Most lines and cells that are counted for one agent's observations, and the bytes of a line that are compared."""
LEAST = 0.5
"""Least change of a cell's probability by a line that counts as an effect."""
NEAR = 0.8
"""Of the lines that change a cell, those count whose effect is at least this fraction of the largest."""

Cells = NDArray[np.int32]
Layout = tuple[tuple[int, int], ...]
"""(rows, columns) of each block of a text."""


class LineEffects(nn.Module):
    """What each line of a team's answers changes in one agent's observations.

    A cell is a place in a block together with a character that appears there. For line l and cell c, over the turns in which
    the character was not there before:

        effect(l, c) = P(c after | l said) - P(c after | l not said)

    where the first is counted as hits / (turns + 1), so that rare lines have small effects.
    """

    lines_LB: Tensor
    """(L, B) uint8, UTF-8 of each line, filled with zeros."""
    said_L: Tensor
    """(L,) turns in which the line was said."""
    cells_K4: Tensor
    """(K, 4) int32: block, row, column and code point; -1 for an unused place."""
    hits_LK: Tensor
    """(L, K) turns with the line after which the character was there and had not been before."""
    open_LK: Tensor
    """(L, K) turns with the line before which the character was not there."""
    hits_K: Tensor
    """(K,) the same over all turns."""
    open_K: Tensor
    start_3: Tensor
    """Over the blocks after first turns: cells equal to the first observation's, cells equal to the blank character, and that
    character's code point."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lines_LB", torch.zeros(LINES, BYTES, dtype=torch.uint8))
        self.register_buffer("said_L", torch.zeros(LINES))
        self.register_buffer("cells_K4", torch.full((CELLS, 4), -1, dtype=torch.int32))
        self.register_buffer("hits_LK", torch.zeros(LINES, CELLS))
        self.register_buffer("open_LK", torch.zeros(LINES, CELLS))
        self.register_buffer("hits_K", torch.zeros(CELLS))
        self.register_buffer("open_K", torch.zeros(CELLS))
        self.register_buffer("start_3", torch.zeros(3, dtype=torch.int64))

    def known(self) -> dict[bytes, Cells]:
        """Line -> its cells, (C, 4) as in `cells_K4`."""
        places, cells_K4 = self._places(), self.cells_K4[self.cells_K4[:, 0] >= 0].numpy()
        if not places or not len(cells_K4):
            return {}
        L, K = max(places.values()) + 1, len(cells_K4)  # places are filled in order
        hits_LK, open_LK = self.hits_LK[:L, :K], self.open_LK[:L, :K]
        without_LK = (self.hits_K[:K] - hits_LK) / (self.open_K[:K] - open_LK).clamp_min(1)
        effect_LK = hits_LK / (open_LK + 1) - without_LK
        chosen_LK = ((effect_LK >= LEAST) & (effect_LK >= NEAR * effect_LK.amax(0))).numpy()
        return {line: cells_K4[chosen_LK[place]] for line, place in places.items()}

    def before(self, point: Point, agent: str) -> tuple[Layout, Cells] | None:
        """Layout and code points (C,) of an agent's blocks before a turn; None without blocks.

        An episode may begin with a drawing of its goal instead of its state. The blocks are then blank if blocks after first
        turns are more like blank ones than like those of the first observation.
        """
        found = laid_out(point.newest.get(agent, ""))
        if found is None or point.newest[agent] != point.first[agent]:
            return found
        as_first, as_blank, blank = self.start_3.tolist()
        return found if as_first >= as_blank else (found[0], np.full_like(found[1], blank))

    def learn(self, samples: Sequence[tuple[Point, str, Turn]], agent: str) -> None:
        """Add turns: the point before, the agent's next observation, and the turn with its answers."""
        drawn = [
            (point, turn, *after)
            for point, text, turn in samples
            if (after := laid_out(text)) and (first := laid_out(point.newest.get(agent, ""))) and first[0] == after[0]
        ]
        self._learn_start([(point, cells) for point, _, _, cells in drawn if point.newest[agent] == point.first[agent]], agent)
        said = [set(lines_of(turn.completions[a].text for a in turn.completions)) for _, turn, _, _ in drawn]
        befores = [self.before(point, agent) for point, _, _, _ in drawn]
        changes = [(layout, b[1], a) for b, (_, _, layout, a) in zip(befores, drawn, strict=True) if b]
        self._add_lines(Counter(line for lines in said for line in lines))
        self._add_cells(changes)
        places, cells_K4 = self._places(), self.cells_K4.numpy()
        where = {layout: _where(cells_K4, layout) for layout, _, _ in changes}
        for lines, (layout, before_C, after_C) in zip(said, changes, strict=True):
            at_K, there_K = where[layout]
            open_K = there_K & (before_C[at_K] != cells_K4[:, 3])
            hits_K = open_K & (after_C[at_K] == cells_K4[:, 3])
            known = [places[line] for line in lines if line in places]
            for total, counts, now_K in ((self.open_K, self.open_LK, open_K), (self.hits_K, self.hits_LK, hits_K)):
                now = torch.from_numpy(now_K.astype(np.float32))
                total += now
                counts[known] += now
            self.said_L.index_add_(0, torch.tensor(known, dtype=torch.int64), torch.ones(len(known)))

    def _learn_start(self, firsts: Sequence[tuple[Point, Cells]], agent: str) -> None:
        if not firsts:
            return
        counts = Counter(np.concatenate([cells for _, cells in firsts]).tolist())
        if not self.start_3[2]:
            self.start_3[2].fill_(max(sorted(counts), key=lambda code: counts[code]))
        for point, cells in firsts:
            first = laid_out(point.first[agent])
            assert first is not None
            self.start_3[0].add_(int((cells == first[1]).sum()))
            self.start_3[1].add_(int((cells == self.start_3[2].item()).sum()))

    def _places(self) -> dict[bytes, int]:
        rows = [bytes(row).rstrip(b"\0") for row in self.lines_LB.numpy()]
        return {line: place for place, line in enumerate(rows) if line}

    def _add_lines(self, counts: Counter[bytes]) -> None:
        """Give new lines a place, the most frequent first; where none is left, that of a line that was said less often."""
        places = self._places()
        free = [place for place in range(LINES) if place not in set(places.values())]
        rarest = sorted(places.values(), key=lambda place: (self.said_L[place].item(), place))
        for line in sorted(counts.keys() - places.keys(), key=lambda line: (-counts[line], line)):
            if not free and (not rarest or self.said_L[rarest[0]] >= counts[line]):
                return
            place = free.pop(0) if free else rarest.pop(0)
            for counted in (self.lines_LB, self.said_L, self.hits_LK, self.open_LK):
                counted[place].zero_()
            self.lines_LB[place, : len(line)].copy_(torch.tensor(list(line), dtype=torch.uint8))

    def _add_cells(self, changes: Iterable[tuple[Layout, Cells, Cells]]) -> None:
        """Give cells that changed a place, in order of their places in the blocks, until none is left."""
        known = {tuple(cell) for cell in self.cells_K4.tolist() if cell[0] >= 0}
        found: set[tuple[int, ...]] = set()
        for layout, before_C, after_C in changes:
            changed = (before_C != after_C).nonzero()[0]
            found |= {(*place, code) for place, code in zip(_places_of(layout)[changed].tolist(), after_C[changed].tolist())}
        for cell in sorted(found - known)[: CELLS - len(known)]:
            self.cells_K4[len(known)].copy_(torch.tensor(cell, dtype=torch.int32))
            known.add(cell)


class Effects:
    """Counterfactuals from learned effects: the next observations if the team-mates' lines alone had their effects.

    What it predicts depends on the histories, on the team-mates' answers of the turn and on counts over earlier iterations,
    and not on the agent's own answer.

    Args: agents: those whose observations are read.
    """

    def __init__(self, agents: Sequence[str]):
        self.observers = nn.ModuleList(LineEffects() for _ in agents)
        self.agents = tuple(agents)

    def outcomes(self, batch: Batch, agent: str) -> dict[tuple[int, int], Counterfactual]:
        """(episode, turn) -> the turn without the agent's answer; where no observation before it has blocks, it is unknown.

        Rewards and metrics are those before the turn.
        """
        effects = [(who, table, table.known()) for who, table in self._tables()]
        found = {}
        for e, episode in enumerate(batch.episodes):
            points = points_of(episode)
            for t, turn in enumerate(episode.turns):
                if t < episode.own_from or agent not in turn.completions or len(turn.completions) < 2:
                    continue
                lines = lines_of(answer.text for other, answer in turn.completions.items() if other != agent)
                seen = {}
                for who, table, known in effects:
                    before = table.before(points[t], who)
                    if before is not None:
                        seen[who] = redrawn(points[t].newest[who], *_applied(before, lines, known))
                if seen:
                    found[e, t] = Counterfactual(0.0, points[t].last, dict(points[t].metrics), seen)
        return found

    def learn(self, batch: Batch) -> None:
        """Add this iteration's turns."""
        samples: dict[str, list[tuple[Point, str, Turn]]] = {agent: [] for agent in self.agents}
        for episode in batch.episodes:
            points = points_of(episode)
            following = [turn.observations for turn in episode.turns[1:]] + [episode.observations]
            for t in range(episode.own_from, len(episode.turns)):
                for agent in samples.keys() & following[t].keys():
                    samples[agent].append((points[t], following[t][agent], episode.turns[t]))
        for agent, table in self._tables():
            table.learn(samples[agent], agent)

    def _tables(self) -> Iterator[tuple[str, LineEffects]]:
        for agent, table in zip(self.agents, self.observers, strict=True):
            assert isinstance(table, LineEffects)
            yield agent, table


def lines_of(texts: Iterable[str]) -> list[bytes]:
    """The lines of answers, in order, as they are compared."""
    lines = [raw.strip().encode(errors="surrogatepass") for text in texts for raw in text.split("\n")]
    return [kept for line in lines if (kept := line[:BYTES].rstrip(b"\0"))]


def laid_out(text: str) -> tuple[Layout, Cells] | None:
    """Layout and code points (C,) of all blocks of a text; None without blocks."""
    found = blocks(text)
    if not found:
        return None
    cells = "".join(line for _, block in found for line in block)
    layout = tuple((len(block), len(block[0])) for _, block in found)
    return layout, np.frombuffer(cells.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def redrawn(text: str, layout: Layout, cells: Cells) -> str:
    """The text with these characters in its blocks."""
    lines, characters, at = text.split("\n"), cells.astype("<i4").tobytes().decode("utf-32-le", "surrogatepass"), 0
    for (start, _), (rows, columns) in zip(blocks(text), layout, strict=True):
        for row in range(rows):
            lines[start + row], at = characters[at : at + columns], at + columns
    return "\n".join(lines)


def _applied(before: tuple[Layout, Cells], lines: Iterable[bytes], known: Mapping[bytes, Cells]) -> tuple[Layout, Cells]:
    """The blocks after the known effects of these lines, in order."""
    layout, cells = before
    found = [known[line] for line in lines if line in known]
    if found:
        cells_C4 = np.concatenate(found)
        at, there = _where(cells_C4, layout)
        cells = cells.copy()
        cells[at[there]] = cells_C4[there, 3]  # of several, the last
    return layout, cells


def _places_of(layout: Layout) -> Cells:
    """(C, 3): block, row and column of every place of a layout."""
    rows = [(b, r, c) for b, (height, width) in enumerate(layout) for r in range(height) for c in range(width)]
    return np.array(rows, dtype=np.int32)


def _where(cells_K4: Cells, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(K,) index of each cell's place among the characters of a layout, and whether it lies in it."""
    shapes = np.array([*layout, (0, 0)], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(shapes[:-1, 0] * shapes[:-1, 1])])
    block = np.where((cells_K4[:, 0] >= 0) & (cells_K4[:, 0] < len(layout)), cells_K4[:, 0], len(layout))
    there = (cells_K4[:, 1] < shapes[block, 0]) & (cells_K4[:, 2] < shapes[block, 1])
    at = starts[block] + cells_K4[:, 1] * shapes[block, 1] + cells_K4[:, 2]
    return np.where(there, at, 0), there
