"""Houses for `house_build`: blueprints in the public format, rectangles per layer, and new houses drawn from a seed.

A cell is (x, y, z): x to the right, y up, z to the back, all from 0. A blueprint names the block of every filled cell; all
other cells of its box are air.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from collm import seeds
from collm.envs.data import Row, read_rows
from collm.envs.gathering.grid import Part, part_of
from collm.errors import EnvError

Cell = tuple[int, int, int]
Size = tuple[int, int, int]
Layers = tuple[tuple[str, ...], ...]
"""One tuple of rows for each y from 0 up, one row for each z, one symbol for each x."""

SMALLEST, LARGEST = 3, 16
"""Smallest and largest side of a generated house's box; your own blueprints may be smaller."""
SYMBOLS = {
    "C": "white_concrete",
    "O": "obsidian",
    "S": "stone_stairs",
    "B": "stone_bricks",
    "D": "planks",
    "A": "air",
}

_BLOCK = re.compile(r"[a-z_]{1,40}", re.ASCII)


@dataclass(frozen=True)
class Rectangle:
    """Cells x1..x2, z1..z2 of one layer, both ends included, all of one block."""

    block: str
    x1: int
    z1: int
    x2: int
    z2: int


@dataclass(frozen=True)
class House:
    """A blueprint: its box and the block of every filled cell. Example: read_house("post", (1, 2, 1), (("O",), ("D",)))"""

    name: str
    size: Size
    blocks: Mapping[Cell, str]

    @property
    def volume(self) -> int:
        """Cells of the box."""
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def counts(self) -> dict[str, int]:
        """How many cells each block fills, the lowest block first."""
        return dict(Counter(self.blocks[cell] for cell in sorted(self.blocks, key=from_below)))

    def same_as(self, other: House) -> bool:
        """Whether both have the same size and blocks; names are not compared."""
        return (self.size, self.blocks) == (other.size, other.blocks)


def from_below(cell: Cell) -> Cell:
    """Sorts cells by layer from the ground up, then by row, then from left to right."""
    x, y, z = cell
    return y, z, x


# --- rectangles ----------------------------------------------------------------------------------------------------------


def rectangles(blocks: Mapping[Cell, str], y: int) -> list[Rectangle]:
    """One layer as rectangles that do not overlap and cover all of its filled cells, in the order of their first cells.

    Each begins at the first uncovered cell and grows to the right and then to the back, or to the back and then to the right,
    depending on which rectangle has more cells.
    """
    left = {(x, z): block for (x, level, z), block in blocks.items() if level == y}
    found = []
    for z, x in sorted((z, x) for x, z in left):
        if (x, z) in left:
            block = left[x, z]
            wide = _grow_right(left, block, x, z)
            deep = _grow_back(left, block, x, x, z)
            choices = [(wide, _grow_back(left, block, x, wide, z)), (_grow_right_all(left, block, x, z, deep), deep)]
            x2, z2 = max(choices, key=lambda corner: (corner[0] - x + 1) * (corner[1] - z + 1))
            found.append(Rectangle(block, x, z, x2, z2))
            for column in range(x, x2 + 1):
                for row in range(z, z2 + 1):
                    del left[column, row]
    return found


def _grow_right(left: Mapping[tuple[int, int], str], block: str, x: int, z: int) -> int:
    return _grow_right_all(left, block, x, z, z)


def _grow_right_all(left: Mapping[tuple[int, int], str], block: str, x: int, z1: int, z2: int) -> int:
    while all(left.get((x + 1, z)) == block for z in range(z1, z2 + 1)):
        x += 1
    return x


def _grow_back(left: Mapping[tuple[int, int], str], block: str, x1: int, x2: int, z: int) -> int:
    while all(left.get((x, z + 1)) == block for x in range(x1, x2 + 1)):
        z += 1
    return z


def listing(blocks: Mapping[Cell, str]) -> str:
    """Rectangles per layer as text: a line `y 1: planks 0 0 3 0, 0 1 0 2; obsidian 1 1 2 2` for each layer with blocks."""
    lines = []
    for y in sorted({y for _, y, _ in blocks}):
        grouped: dict[str, list[str]] = {}
        for part in rectangles(blocks, y):
            grouped.setdefault(part.block, []).append(f"{part.x1} {part.z1} {part.x2} {part.z2}")
        lines.append(f"y {y}: " + "; ".join(f"{block} {', '.join(parts)}" for block, parts in grouped.items()))
    return "\n".join(lines)


# --- the public format ---------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def read_house(name: str, size: Size, layers: Layers, inventory: tuple[tuple[str, str], ...] = tuple(SYMBOLS.items())) -> House:
    """A house from rows of symbols, one per layer and z, and the block of each symbol. Raises EnvError for invalid content."""
    width, height, depth = size
    meaning = dict(inventory)
    if not all(1 <= side <= LARGEST for side in size):
        raise EnvError(f"house {name!r} has the size {list(size)}; each side must be from 1 to {LARGEST}.")
    if not all(len(symbol) == 1 and _BLOCK.fullmatch(block) for symbol, block in inventory):
        raise EnvError(f"house {name!r}: inventory must give single symbols names of blocks such as 'stone_bricks'.")
    if len(layers) != height or any(len(rows) != depth or {len(row) for row in rows} != {width} for rows in layers):
        raise EnvError(f"house {name!r} must have {height} layers of {depth} rows of {width} symbols, as its size says.")
    unknown = {symbol for rows in layers for row in rows for symbol in row} - set(meaning)
    if unknown:
        raise EnvError(f"house {name!r}: its inventory does not name the symbols {', '.join(sorted(unknown))!r}.")
    blocks = {
        (x, y, z): meaning[symbol]
        for y, rows in enumerate(layers)
        for z, row in enumerate(rows)
        for x, symbol in enumerate(row)
        if meaning[symbol] != "air"
    }
    if not blocks:
        raise EnvError(f"house {name!r} is nothing but air; fill at least one cell.")
    return House(name, size, blocks)


def house_of(row: Row, index: int = 0) -> House:
    """The house of one row in the public format: {"task_id", "inventory", "target_spec": {"size", "layers": [{"y", "rows"}]}}.

    `inventory` and `target_spec` may be JSON text, as some tables store them; a missing layer is air. Other fields are not
    read. Raises EnvError for a row in any other format.
    """
    name = str(row.get("task_id", index))
    try:
        inventory, spec = _decoded(row["inventory"]), _decoded(row["target_spec"])
        width, height, depth = (int(side) for side in spec["size"])
        air = next(symbol for symbol, block in inventory.items() if block == "air")
        levels = {int(layer["y"]): tuple(str(line) for line in layer["rows"]) for layer in spec["layers"]}
        if len(levels) < len(spec["layers"]) or not set(levels) <= set(range(min(height, LARGEST + 1))):
            raise ValueError("its layers are not numbered 0 to height - 1, each once")
        empty = (air * min(width, LARGEST + 1),) * min(depth, LARGEST + 1)
        layers = tuple(levels.get(y, empty) for y in range(min(height, LARGEST + 1)))
        return read_house(name, (width, height, depth), layers, tuple((str(s), str(block)) for s, block in inventory.items()))
    except StopIteration:
        raise EnvError(f"house {name!r}: no symbol of its inventory is 'air'.") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise EnvError(f"house {name!r} is not in the public format: {type(error).__name__}: {error}.") from error


def _decoded(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def distinct(houses: Iterable[House]) -> list[House]:
    """The distinct houses, each under the name it had first."""
    kept: list[House] = []
    for house in houses:
        if not any(house.same_as(other) for other in kept):
            kept.append(house)
    return kept


def split_houses(data: str, eval_data: str | None, split: str) -> list[House]:
    """The distinct houses of one split of a source.

    Repeated houses are dropped: the reference's ten entries are five houses, and its two held-out entries are the same one.
    Without `eval_data` the last fifth of the distinct houses is held out, at least one. With `eval_data`, each split has its
    own source, and held-out houses are removed from the training houses. Raises EnvError for a split without a house.
    """
    houses = distinct(house_of(row, index) for index, row in enumerate(read_rows(data)))
    if eval_data is not None:
        held_out = distinct(house_of(row, index) for index, row in enumerate(read_rows(eval_data)))
    else:
        held_out = houses[-max(1, len(houses) // 5) :]
    kept = held_out if split == "eval" else [house for house in houses if not any(map(house.same_as, held_out))]
    if not kept:
        raise EnvError(f"data={data!r} has no house left for the split {split!r}; give more houses, or eval_data=... besides.")
    return kept


# --- new houses ----------------------------------------------------------------------------------------------------------


def checked_size(size: Sequence[int]) -> Size:
    """[width, height, depth] of generated houses' boxes. Raises EnvError for a side out of range."""
    if len(size) != 3 or not all(type(side) is int and SMALLEST <= side <= LARGEST for side in size):
        raise EnvError(f"size={list(size)!r} must be [width, height, depth], each from {SMALLEST} to {LARGEST}.")
    return size[0], size[1], size[2]


@lru_cache(maxsize=2048)
def generated(part: Part, size: Size, task: int) -> House:
    """House number `task` of a part; its name holds part, size and number."""
    return read_house(f"{part}-{'x'.join(map(str, size))}-{task}", size, generated_layers(part, size, task))


def generated_layers(part: Part, size: Size, task: int) -> Layers:
    """House number `task` of a part as rows: the first house of this task's random stream that belongs to the part.

    The part of a house is a function of the house itself (an eighth is held out, an eighth reserved for pre-training), so the
    parts are disjoint for every size of the box.
    """
    for attempt in range(10_000):
        layers = draw_house(seeds.stream("house_build", part, *size, task, attempt), size)
        if part_of(layers) == part:
            return layers
    raise EnvError(f"size={list(size)} leaves no room for a house of the part {part}; take a larger one.")


def draw_house(rng: random.Random, size: Size) -> Layers:
    """A small house: a floor, walls with or without posts, a door, windows where there is height for them, and a roof.

    Floor and walls never have the same block. In all public houses they have, so a public house is never drawn.
    """
    width, height, depth = size
    x1, x2 = _span(rng, width)
    z1, z2 = _span(rng, depth)
    top = rng.randint(min(2, height - 2), height - 2)
    floor, wall = rng.sample("CBD", 2)
    drawn: dict[Cell, str] = {}
    _fill(drawn, floor, (x1, 0, z1), (x2, 0, z2))
    _fill(drawn, wall, (x1, 1, z1), (x2, top, z2))
    _fill(drawn, "A", (x1 + 1, 1, z1 + 1), (x2 - 1, top, z2 - 1))
    if rng.random() < 0.4:
        for x in (x1, x2):
            for z in (z1, z2):
                _fill(drawn, "O", (x, 1, z), (x, top, z))
    _openings(rng, drawn, (x1, z1), (x2, z2), top, "D" if wall != "D" and rng.random() < 0.4 else "A")
    _roof(rng, drawn, (x1, z1), (x2, z2), top + 1, size)
    return tuple(tuple("".join(drawn.get((x, y, z), "A") for x in range(width)) for z in range(depth)) for y in range(height))


def _span(rng: random.Random, side: int) -> tuple[int, int]:
    """First and last cell of a house along one side of the box: at least 3 cells, and at least the side minus 1."""
    length = rng.randint(max(3, side - 1), side)
    first = rng.randint(0, side - length)
    return first, first + length - 1


def _fill(drawn: dict[Cell, str], symbol: str, low: Cell, high: Cell) -> None:
    for x in range(low[0], high[0] + 1):
        for y in range(low[1], high[1] + 1):
            for z in range(low[2], high[2] + 1):
                drawn[x, y, z] = symbol


def _openings(
    rng: random.Random, drawn: dict[Cell, str], low: tuple[int, int], high: tuple[int, int], top: int, door: str
) -> None:
    """A door of one or two cells in one wall and, in walls at least two cells high, possibly windows in the others."""
    sides = ["front", "back", "left", "right"]
    rng.shuffle(sides)
    for number, side in enumerate(sides):
        first, last = (low[0] + 1, high[0] - 1) if side in ("front", "back") else (low[1] + 1, high[1] - 1)
        begin = rng.randint(first, last)
        end = min(last, begin + rng.randint(0, 1))
        if number == 0:
            bottom, lintel = 1, min(top, rng.randint(1, 2))
        elif top >= 2 and rng.random() < 0.3:
            bottom = lintel = 2
        else:
            continue
        for y in range(bottom, lintel + 1):
            for along in range(begin, end + 1):
                x, z = {
                    "front": (along, low[1]),
                    "back": (along, high[1]),
                    "left": (low[0], along),
                    "right": (high[0], along),
                }[side]
                drawn[x, y, z] = door if number == 0 and y == 1 else "A"


def _roof(rng: random.Random, drawn: dict[Cell, str], low: tuple[int, int], high: tuple[int, int], y: int, size: Size) -> None:
    """A flat roof, a roof with rims of stairs, or a gable that narrows upwards as far as the box allows; some have eaves."""
    _, height, depth = size
    kind = rng.choice(("flat", "rim", "gable"))
    block, rim = rng.choice("BBCD"), "S"
    (x1, z1), (x2, z2) = low, high
    if rng.random() < 0.4:
        z1, z2 = max(0, z1 - 1), min(depth - 1, z2 + 1)
    if kind == "flat":
        _fill(drawn, block, (x1, y, z1), (x2, y, z2))
    while kind != "flat" and y < height and z1 <= z2:
        _fill(drawn, block, (x1, y, z1), (x2, y, z2))
        if z1 < z2:
            _fill(drawn, rim, (x1, y, z1), (x2, y, z1))
            _fill(drawn, rim, (x1, y, z2), (x2, y, z2))
        y, z1, z2 = (y + 1, z1 + 1, z2 - 1) if kind == "gable" else (height, z1, z2)
