"""Pictures of StrBuild's builds before and after training, in a terminal and as a PNG."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from rich.console import Group
from rich.table import Table
from rich.text import Text

from collm.runs.files import replacing
from collm.runs.read import Record

BLOCKS = {
    "oak_planks": "#c8964e",
    "stone": "#8b939c",
    "white_concrete": "#f3f4f1",
    "obsidian": "#7552c8",
    "bricks": "#b5523b",
    "glass": "#9fd8e6",
    "sandstone": "#e0cf8f",
    "glowstone": "#f0a92e",
    "gold_block": "#f5e04a",
    "iron_block": "#4f87b5",
    "red_wool": "#8e2a35",
    "blue_wool": "#2f4fd0",
    "birch_planks": "#b9d38a",
    "andesite": "#5f8a80",
    "quartz_block": "#e6c9e2",
    "coal_block": "#5c4433",
}
"""Block and colour of each hexadecimal digit in a build; each pair belongs to one builder. Colours are easy to tell apart."""
WALL, EMPTY, MISSING, EXTRA = "#14181d", "#1e242b", "#46515e", "#ff4d4d"
_STATE = re.compile(r"word (\S+) turn \d+ of \d+[^\n]*\ntarget:\n([#.\n]+)\nbuild:\n([\da-f.\n]+)")


@dataclass(frozen=True, slots=True)
class Build:
    """The last build of an episode.

    target: rows from the top, `#` or `.`; blocks: rows of the same shape, a block's digit or `.`.
    Example: Build("I", ("###", ".#."), ("0.1", ".2."), ("builder_0", "builder_1"), reward=0.7, iou=0.75)
    """

    word: str
    target: tuple[str, ...]
    blocks: tuple[str, ...]
    agents: tuple[str, ...]
    reward: float
    iou: float

    @property
    def caption(self) -> str:
        return f"IoU {self.iou:.2f}, reward {self.reward:.2f}"

    def cells(self) -> Iterator[tuple[int, int, bool, str]]:
        """(column, row from the top, whether it belongs to the word, digit or `.`) of every cell."""
        for row, (wanted, built) in enumerate(zip(self.target, self.blocks, strict=True)):
            for column, (mark, block) in enumerate(zip(wanted, built, strict=True)):
                yield column, row, mark == "#", block


@dataclass(frozen=True, slots=True)
class Gallery:
    """The same words before and after training. numbers: their places, from 1, among `num_words` held-out words."""

    before: list[Build]
    after: list[Build]
    numbers: list[int]
    num_words: int

    @property
    def choice(self) -> str:
        """A sentence on how the words were chosen."""
        if len(self.numbers) == self.num_words:
            return "all held-out words"
        listed = ", ".join(map(str, self.numbers))
        return f"words {listed} of {self.num_words} held-out words: evenly spaced, not picked by result"


def read_build(episode: Record) -> Build | None:
    """The last build in an episode's record; None if the environment is not StrBuild."""
    found = _STATE.fullmatch(episode["state"])
    if found is None or not episode["turns"] or episode["score"] is None:
        return None
    target, blocks = (tuple(text.split("\n")) for text in found.groups()[1:])
    if [len(row) for row in target] != [len(row) for row in blocks]:
        return None
    agents = tuple(episode["turns"][-1]["agents"])
    iou = episode["metrics"].get("iou")
    return Build(found[1], target, blocks, agents, float(episode["score"]), float("nan" if iou is None else iou))


def choose(before: Sequence[Record], after: Sequence[Record]) -> Gallery | None:
    """At most three evenly spaced words among those built both before and after training; None if there are none."""
    old, new = ({b.word: b for b in map(read_build, episodes) if b} for episodes in (before, after))
    words = [word for word in new if word in old]
    if not words:
        return None
    places = np.unique(np.linspace(0, len(words) - 1, min(3, len(words))).round().astype(int)).tolist()
    chosen = [words[place] for place in places]
    return Gallery([old[w] for w in chosen], [new[w] for w in chosen], [place + 1 for place in places], len(words))


def picture(gallery: Gallery, width: int) -> Group:
    """The gallery for a terminal of `width` columns, with two characters per cell.

    The characters are readable without colours: a block's digit twice; `x` and the digit for a block outside the word; `..` for
    a cell of the word that is empty.
    """
    words: list[Table | Text] = []
    for old, new in zip(gallery.before, gallery.after, strict=True):
        captions = f"{old.word} before  {old.caption}", f"{new.word} after  {new.caption}"
        walls = [Text.assemble((c, "bold"), "\n", _wall(b)) for c, b in zip(captions, (old, new), strict=True)]
        if sum(max(2 * len(old.target[0]), len(caption)) for caption in captions) + 3 <= width:
            pair = Table.grid(padding=(0, 3))
            pair.add_row(*walls)
            words += [pair, Text()]
        else:
            words += [*walls, Text()]
    return Group(*words, _legend(gallery.after[0]), Text(gallery.choice, style="dim"))


def _wall(build: Build) -> Text:
    """Rows of two-character cells. The digits of a filled cell have its colour, so that they show only without colours."""
    wall = Text()
    for column, row, wanted, block in build.cells():
        if column == 0 and row:
            wall.append("\n")
        if block == ".":
            wall.append(*("..", f"{MISSING} on {MISSING}") if wanted else ("  ", f"on {WALL}"))
            continue
        colour = _colour(block)
        wall.append("x" if not wanted else block, f"bold {EXTRA if not wanted else colour} on {colour}")
        wall.append(block, f"{colour} on {colour}")
    return wall


def _legend(build: Build) -> Text:
    """The block of each colour and digit, for every builder."""
    legend = Text()
    for agent, blocks in _palettes(build.agents).items():
        legend.append(f"{agent}: ")
        for digit, block in blocks:
            legend.append(digit * 2, f"{BLOCKS[block]} on {BLOCKS[block]}")
            legend.append(f" {block}  ")
    legend.append("\n")
    legend.append("..", f"{MISSING} on {MISSING}")
    legend.append(" left empty  ")
    legend.append("x", f"bold {EXTRA}")
    legend.append(" outside the word")
    return legend


@rc_context({"text.parse_math": False})  # a name may hold $
def draw_builds(gallery: Gallery, title: str, path: Path) -> Path:
    """The gallery as a PNG: one column per word, before above after. Raises SaveError."""
    columns = [len(build.target[0]) for build in gallery.after]
    rows = len(gallery.after[0].target)
    cell = min(0.22, 10 / sum(columns))  # inches
    size = (max(7.0, cell * sum(columns) + 0.3 * len(columns) + 0.3), 2 * (cell * rows + 0.4) + 1.1)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(2, len(columns), squeeze=False, gridspec_kw={"width_ratios": columns})
    for panels, builds, label in zip(grid, (gallery.before, gallery.after), ("before", "after"), strict=True):
        for axes, build in zip(panels, builds, strict=True):
            _draw_wall(axes, build, cell)
        panels[0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=11, fontweight="bold", x=0.01, ha="left")
    figure.legend(
        handles=_handles(gallery.after[0]),
        title=gallery.choice,
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
    )
    with replacing(path) as aside:
        figure.savefig(aside, format=path.suffix.removeprefix("."))
    return path


def _draw_wall(axes: Axes, build: Build, cell: float) -> None:
    width, height = len(build.target[0]), len(build.target)
    axes.add_patch(Rectangle((-0.15, -0.15), width + 0.3, height + 0.3, facecolor=WALL))
    for column, row, wanted, block in build.cells():
        colour = _colour(block) if block != "." else MISSING if wanted else EMPTY
        axes.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=colour))
        if block != "." and not wanted:
            for shade, wide in ((WALL, 3.0), (EXTRA, 1.6)):
                axes.plot(column + 0.5, row + 0.5, marker="x", color=shade, markersize=32 * cell, markeredgewidth=wide)
    axes.set(xlim=(-0.15, width + 0.15), ylim=(height + 0.15, -0.15), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(f"{build.word}   {build.caption}", fontsize=9)


def _handles(build: Build) -> list[Artist]:
    handles: list[Artist] = [
        Patch(facecolor=BLOCKS[block], edgecolor="#9aa0a6", linewidth=0.5, label=f"{block} ({agent})")
        for agent, blocks in _palettes(build.agents).items()
        for _, block in blocks
    ]
    extra = Line2D([], [], color=EXTRA, marker="x", linestyle="", markeredgewidth=1.6, label="outside the word")
    return [*handles, Patch(facecolor=MISSING, label="left empty"), extra]


def _palettes(agents: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Builder -> its (digit, block) pairs."""
    named = [(f"{i:x}", block) for i, block in enumerate(BLOCKS)]
    return {agent: named[2 * n : 2 * n + 2] for n, agent in enumerate(agents)}


def _colour(digit: str) -> str:
    return list(BLOCKS.values())[int(digit, 16)]
