"""Shared parts of environments on a grid with fog: actions as one JSON object, steps, views, messages and generated maps.

`building/bridge_build.py` and `gathering/resource_gathering.py` use them. A cell is (x, y): x counts to the right and y down,
both from 0. Text written by an agent never raises an error here; unusable parts are counted as rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from collm import seeds
from collm.envs.base import agent_names
from collm.envs.data import Row, read_rows, split_rows
from collm.errors import EnvError

Cell = tuple[int, int]
Made = TypeVar("Made")

MAX_JSON = 1 << 13
"""Largest number of characters of an answer's JSON object; a longer one is malformed."""
MAX_MESSAGE = 160
"""Messages are cut to this many characters."""
MAX_AGENTS = 8
NUM_GENERATED = {"train": 512, "eval": 32}
"""Number of generated tasks of each split."""

Part = Literal["train", "eval", "pretraining"]

_FENCE_BEFORE = re.compile(r"```[a-zA-Z]{0,20}")
_HARMLESS = str.maketrans({"<": "(", ">": ")", "[": "(", "]": ")", "{": "(", "}": ")", '"': "'", "`": "'", "|": "/"})


# --- answers -------------------------------------------------------------------------------------------------------------


def read_action(answer: str, keys: Iterable[str]) -> tuple[dict[str, Any], int]:
    """The known keys of the answer's JSON object, and the number of rejections.

    The object begins at the first `{`. A code fence around it is allowed. Each of these is one rejection: text before the
    object, text after it, every unknown key, and an answer without a well-formed object (which has no effect). An object with
    repeated keys, NaN, or too large numbers or nesting is malformed.
    """
    start = answer.find("{")
    if start < 0:
        return {}, int(bool(answer.strip()))
    try:
        found, end = _DECODER.raw_decode(answer[start : start + MAX_JSON])
    except (ValueError, RecursionError):
        return {}, 1
    before, after = answer[:start].strip(), answer[start + end :].strip()
    rejected = int(bool(before) and not (len(before) < 30 and _FENCE_BEFORE.fullmatch(before)))
    rejected += int(after not in ("", "```"))
    known = set(keys)
    return {key: value for key, value in found.items() if key in known}, rejected + len(found.keys() - known)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is given twice")
    return made


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, strict=False)


def num_entries(answer: str, keys: Iterable[str]) -> int:
    """The number of entries of the answer's JSON object: the items of its lists, and its other values that are not null."""
    found, _ = read_action(answer, keys)
    return sum(len(value) if isinstance(value, list) else value is not None for value in found.values())


def as_list(value: Any) -> tuple[list[Any], int]:
    """(items, rejections): a list is returned unchanged, null gives no items, anything else no items and one rejection."""
    if isinstance(value, list):
        return value, 0
    return [], int(value is not None)


def as_cell(value: Any) -> Cell | None:
    """[x, y] as a cell; None unless the value is a list of two whole numbers."""
    if isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value):
        return value[0], value[1]
    return None


# --- messages ------------------------------------------------------------------------------------------------------------


def harmless(message: str) -> str:
    """A message as one line of at most MAX_MESSAGE characters.

    It cannot close its quotes, imitate a line of the environment or contain a mark of a chat template: brackets become round,
    double quotes single, and characters that are not printable `?`.
    """
    line = " ".join(message.split())[:MAX_MESSAGE].translate(_HARMLESS)
    return "".join(character if character.isprintable() else "?" for character in line).strip()


def num_tokens(message: str) -> int:
    """Number of whitespace tokens."""
    return len(message.split())


# --- geometry ------------------------------------------------------------------------------------------------------------


def beside(cell: Cell) -> tuple[Cell, Cell, Cell, Cell]:
    """The four cells that share an edge with `cell`."""
    x, y = cell
    return (x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)


def steps_between(cell: Cell, other: Cell) -> int:
    """Number of steps from one cell to another, diagonal steps allowed (Chebyshev distance)."""
    return max(abs(cell[0] - other[0]), abs(cell[1] - other[1]))


def distance(cell: Cell, other: Cell) -> int:
    """Manhattan distance."""
    return abs(cell[0] - other[0]) + abs(cell[1] - other[1])


def view(cells: Iterable[Cell], radius: int, width: int, height: int) -> set[Cell]:
    """The cells that are seen from `cells`: the square of `radius` around each, inside the map."""
    return {
        (x, y)
        for cell in cells
        for x in range(max(0, cell[0] - radius), min(width, cell[0] + radius + 1))
        for y in range(max(0, cell[1] - radius), min(height, cell[1] + radius + 1))
    }


def walk(start: Cell, path: Any, steps: int, is_open: Callable[[Cell], bool]) -> tuple[list[Cell], int]:
    """The cells walked along `path`, and how many of its entries were rejected.

    Each entry must be one of the eight neighbours of the entry before it, the first entry a neighbour of `start` (or `start`
    itself, which is skipped). The walk ends before the first entry that is not such a cell, is not open, or exceeds `steps`
    steps; this entry and all later ones are rejected.
    """
    entries, rejected = as_list(path)
    if entries and as_cell(entries[0]) == start:
        entries = entries[1:]
    walked: list[Cell] = []
    for index, entry in enumerate(entries):
        cell, here = as_cell(entry), walked[-1] if walked else start
        if cell is None or len(walked) == steps or steps_between(cell, here) != 1 or not is_open(cell):
            return walked, len(entries) - index
        walked.append(cell)
    return walked, rejected


def rows_of(width: int, height: int, symbol: Callable[[Cell], str]) -> str:
    """A map as rows of single characters, the top row first."""
    return "\n".join("".join(symbol((x, y)) for x in range(width)) for y in range(height))


# --- tasks ---------------------------------------------------------------------------------------------------------------


def drawn(make: Callable[..., Made | None], name: str, part: Part, size: tuple[int, int], task: int) -> Made:
    """Task number `task` of a generator: the first map of this task's random stream that belongs to `part`.

    The part of a map is a function of the map itself (an eighth is held out, an eighth reserved for pre-training), so the parts
    are disjoint for every map size. `make(rng, size)` may return None, which rejects the draw.
    """
    for attempt in range(10_000):
        made = make(seeds.stream(name, part, *size, task, attempt), size)
        if made is not None and part_of(made) == part:
            return made
    raise EnvError(f"size={size} leaves no room for a map of {name}; take a larger one.")


def part_of(made: Any) -> Part:
    """The part that a generated map belongs to."""
    number = seeds.derive("part", repr(made)) % 8
    return "eval" if number == 0 else "pretraining" if number == 1 else "train"


def task_rows(
    data: str | None,
    eval_data: str | None,
    maps: Sequence[Row] | None,
    split: str,
    held_out: Callable[[Sequence[Row]], Sequence[bool]],
) -> list[Row] | None:
    """The split's rows in the public format, or None if maps are generated.

    `held_out` returns which rows of a file are for evaluation. Raises EnvError for sources that contradict each other, cannot
    be read or are empty.
    """
    if split not in ("train", "eval"):
        raise EnvError(f"split={split!r} is not one of train, eval.")
    if maps is not None:
        if data is not None or eval_data is not None or not maps:
            raise EnvError(f"maps={list(maps)!r:.80} must hold at least one map; leave data and eval_data out with it.")
        return list(maps)
    if data is None:
        if eval_data is not None:
            raise EnvError(f"eval_data={eval_data!r} holds the evaluation maps of data; set data=... too.")
        return None
    if eval_data is not None:
        return split_rows(data, eval_data, split)
    rows = read_rows(data)
    kept = [row for row, out in zip(rows, held_out(rows)) if out == (split == "eval")]
    if not kept:
        raise EnvError(f"data={data!r} has no map for the split {split!r}; give more maps, or eval_data=... besides.")
    return kept


def team(agents: int | Sequence[str], names: Sequence[str]) -> list[str]:
    """Names of the agents: for a number, `names` repeated in order, with the suffix _2, _3, ... from the second round on."""
    number = agents if isinstance(agents, int) else len(agents)
    if not 1 <= number <= MAX_AGENTS:
        raise EnvError(f"agents={agents!r}: from one to {MAX_AGENTS} agents fit on a map; take a number in that range.")
    if not isinstance(agents, int):
        return agent_names(agents, "agent")
    return [name if turn == 0 else f"{name}_{turn + 1}" for turn in range(number) for name in names][:number]


def checked_size(size: Sequence[int], low: int, high: int) -> tuple[int, int]:
    """(width, height) of generated maps. Raises EnvError for a side outside low..high."""
    if len(size) != 2 or not all(type(side) is int and low <= side <= high for side in size):
        raise EnvError(f"size={size!r} must be [width, height], each from {low} to {high}.")
    return size[0], size[1]


def check_range(low: int, high: int, **settings: int) -> None:
    """Raises EnvError naming the first setting outside low..high."""
    for name, value in settings.items():
        if not low <= value <= high:
            raise EnvError(f"{name}={value} is out of range; set it from {low} to {high}.")
