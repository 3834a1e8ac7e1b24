"""`bridge_build`: builders on two banks lay a bridge of planks over a river with true and fake pillars."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from collm.envs.base import Outcome, TextEnv
from collm.envs.building.bridge_build_wording import PLAIN, PROBES, TERSE, fill_line
from collm.envs.data import Row
from collm.envs.gathering import grid
from collm.envs.gathering.grid import NUM_GENERATED, Cell, Part
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError

COMMANDS = 40
MAX_SIDE = 64
KEYS = ("comm", "probe", "cmds", "path")

_COMMAND = re.compile(r"/fill\s+(\d{1,6})\s+(\d{1,6})\s+(\d{1,6})\s+(\d{1,6})\s+(?:minecraft:)?oak_planks", re.ASCII)


@dataclass(frozen=True)
class BridgeMap:
    """One river. `s` and `t` are the cells to join; `true` and `fake` are its pillars.

    Example: read_map("a", ("#S#", ".Y.", "#T#"))
    """

    name: str
    rows: tuple[str, ...]
    s: Cell
    t: Cell
    true: frozenset[Cell]
    fake: frozenset[Cell]

    @property
    def width(self) -> int:
        return len(self.rows[0])

    @property
    def height(self) -> int:
        return len(self.rows)

    @property
    def floor(self) -> float:
        """Raw reward of a turn without any planks, probes or messages."""
        return -5.0 - 2.0 * len(self.true)

    def at(self, cell: Cell) -> str:
        """The symbol of a cell; `#` outside the map."""
        inside = 0 <= cell[0] < self.width and 0 <= cell[1] < self.height
        return self.rows[cell[1]][cell[0]] if inside else "#"

    def takes_planks(self, cell: Cell) -> bool:
        return self.at(cell) in ".YN"


class BridgeBuild(TextEnv):
    """Builders start on opposite banks of a river, see only the cells around their paths, and join the banks with planks.

    Pillars stand in the water. All look alike (`P`) until a probe shows whether one is true (`Y`) or fake (`N`). What a builder
    saw and probed is shown to that builder alone. An answer is one JSON object, whose keys are all optional:
    {"comm": text, "probe": [[x, z], ...], "cmds": ["/fill x1 z1 x2 z2 oak_planks", ...], "path": [[x, z], ...]}.
    A turn executes, for each agent in this order:
        probe: shows the kind of at most 3 pillars that the agent has seen and not probed before;
        cmds: lay planks on all water and pillars of each rectangle, anywhere on the map (40 commands per turn, split evenly
            between the agents; banks inside a rectangle stay banks);
        path: walks at most `steps` cells, also diagonally, through water but not over banks, and shows all cells within `view`
            cells of each.
    Then every other agent reads `comm` once, at its next turn: on one line, quoted, cut to 160 characters. Planks are permanent
    and show on every cell that an agent has seen. Anything else in an answer is rejected and counted, without a penalty.

    Raw reward of a turn = - 5 if S and T are not joined - 2 * true pillars untouched - 1 * fake pillars touched
    - 0.3 * probes of this turn - 0.001 * whitespace tokens of this turn's messages, after the cut.
    Joined: planks lead from S to T over cells that share edges. Touched: a plank lies on the pillar or on a cell that shares an
    edge with it. The first three terms are computed from the present bridge in every turn. A pillar counts once per turn, and a
    fake pillar that is touched early costs more.
    Ends after `turns` turns.
    Perfect play earns 0 in every turn: a way of planks that touches every true pillar and no fake one is laid in the first
    turn; all public and all generated maps have one. Since this maximum is 0, scores in % are given by the metric `score` =
    1 - raw reward of the last turn / raw reward of a river without planks: 0 for no action, 1 for the optimum.
    Metrics: success (joined), score, supports (fraction of true pillars touched), fakes, probes, message_tokens, planks,
    rejected.

    Args:
        agents: how many builders, or their names. They start at S and T alternately; a single builder starts at S.
        turns: how many turns an episode has.
        size: width and height of generated maps, 5 to 16 each.
        data: maps in the public format; the last third of a file is held out.
        eval_data: a separate source of held-out maps.
        maps: your own maps, as rows of the public format ({"map": [row, ...]}), played in both splits.
        view: how far a builder sees, in cells.
        steps: how many cells a builder may walk in a turn.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval". The generated maps of the two are disjoint.
    """

    max_reward = 0.0
    has_messages = True

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 4,
        size: Sequence[int] = (13, 11),
        data: str | None = None,
        eval_data: str | None = None,
        maps: Sequence[dict[str, Any]] | None = None,
        view: int = 3,
        steps: int = 4,
        wording: Wording = "plain",
        split: str = "train",
    ):
        super().__init__(grid.team(agents, ("bank_s", "bank_t")), turns)
        grid.check_range(0, MAX_SIDE, view=view, steps=steps)
        self.size = grid.checked_size(size, 5, 16)
        self.view, self.steps = view, steps
        rows = grid.task_rows(data, eval_data, maps, split, _held_out)
        self.maps = None if rows is None else [_map_of(row, index) for index, row in enumerate(rows)]
        self.part: Part = "eval" if split == "eval" else "train"
        self.num_tasks = NUM_GENERATED[self.part] if self.maps is None else len(self.maps)
        self.limit = COMMANDS // len(self.possible_agents)
        self.wording = texts_of(wording, PLAIN, TERSE)

    def map_of(self, task: int) -> BridgeMap:
        """The map of one task."""
        return generated(self.part, self.size, task) if self.maps is None else self.maps[task]

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.map = self.map_of(task)
        self.place = {agent: (self.map.s, self.map.t)[index % 2] for index, agent in enumerate(self.agents)}
        self.seen = {agent: self._view([cell]) for agent, cell in self.place.items()}
        self.known: dict[str, set[Cell]] = {agent: set() for agent in self.agents}
        self.planks: set[Cell] = set()
        self.rejected = self.probes = self.message_tokens = 0
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        agents = list(answers)
        said: dict[str, str] = {}
        probes = 0
        for agent, answer in answers.items():
            action, rejected = grid.read_action(answer, KEYS)
            self.rejected += rejected
            probes += self._probe(agent, action.get("probe"))
            self._fill(action.get("cmds"))
            walked, rejected = grid.walk(self.place[agent], action.get("path"), self.steps, lambda c: self.map.at(c) != "#")
            self.rejected += rejected
            self.seen[agent] |= self._view(walked)
            self.place[agent] = walked[-1] if walked else self.place[agent]
            said[agent] = self._message(action.get("comm"))
        tokens = sum(map(grid.num_tokens, said.values()))
        self.probes += probes
        self.message_tokens += tokens
        missing, fakes = self._untouched(), len(self.map.fake) - len(untouched(self.map.fake, self.planks))
        joined = is_joined(self.map, self.planks)
        parts = {
            "gap": 0.0 if joined else -5.0,
            "supports": -2.0 * missing,
            "fakes": -1.0 * fakes,
            "probes": -0.3 * probes,
            "messages": -0.001 * tokens,
        }
        total = sum(parts.values())
        metrics = {
            "success": float(joined),
            "score": 1.0 - total / self.map.floor,
            "supports": 1.0 - missing / len(self.map.true) if self.map.true else 1.0,
            "fakes": float(fakes),
            "probes": float(self.probes),
            "message_tokens": float(self.message_tokens),
            "planks": float(len(self.planks)),
            "rejected": float(self.rejected),
        }
        observations = {}
        for agent in agents:
            heard = [f'{other} says: "{said[other]}"' for other in agents if other != agent and said[other]]
            observations[agent] = self.wording.later(self, agent, heard)
        return Outcome(total, parts, observations, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """The builders divide the cells of `bridge_of` without planks evenly, from the top down; they know the whole map."""
        number = len(self.agents)
        left = sorted(bridge_of(self.map) - self.planks, key=lambda cell: (cell[1], cell[0]))
        answers = {}
        for index, agent in enumerate(self.agents):
            own = runs(set(left[index * len(left) // number : (index + 1) * len(left) // number]))[: self.limit]
            answers[agent] = json.dumps({"cmds": [fill_line(*run) for run in own]})
        return answers

    def state(self) -> str:
        fakes = len(self.map.fake) - len(untouched(self.map.fake, self.planks))
        stand = " ".join(f"{agent} {x},{z}" for agent, (x, z) in self.place.items())
        return (
            f"turn {self.turn} of {self.turns} joined {int(is_joined(self.map, self.planks))} "
            f"missing {self._untouched()} of {len(self.map.true)} fakes {fakes}\n{stand}\n"
            + grid.rows_of(self.map.width, self.map.height, lambda cell: self._symbol(cell, True))
        )

    def num_parts(self, answer: str) -> int:
        return grid.num_entries(answer, KEYS)

    def task_name(self, task: int) -> str:
        return self.map_of(task).name

    def _view(self, cells: Sequence[Cell]) -> set[Cell]:
        return grid.view(cells, self.view, self.map.width, self.map.height)

    def _untouched(self) -> int:
        return len(untouched(self.map.true, self.planks))

    def _probe(self, agent: str, value: Any) -> int:
        """Execute one agent's probes; returns how many were made."""
        entries, rejected = grid.as_list(value)
        made = 0
        for entry in entries:
            cell = grid.as_cell(entry)
            seen = cell is not None and cell in self.seen[agent] and self.map.at(cell) in "YN"
            if cell is None or not seen or cell in self.known[agent] or made == PROBES:
                rejected += 1
                continue
            self.known[agent].add(cell)
            made += 1
        self.rejected += rejected
        return made

    def _fill(self, value: Any) -> None:
        """Execute one agent's commands."""
        entries, rejected = grid.as_list(value)
        filled = 0
        for entry in entries:
            found = _COMMAND.fullmatch(entry.strip()) if isinstance(entry, str) and len(entry) < 200 else None
            x1, z1, x2, z2 = map(int, found.groups()) if found else (MAX_SIDE,) * 4
            if max(x1, x2) >= self.map.width or max(z1, z2) >= self.map.height or filled == self.limit:
                rejected += 1
                continue
            filled += 1
            columns, lines = range(min(x1, x2), max(x1, x2) + 1), range(min(z1, z2), max(z1, z2) + 1)
            self.planks.update((x, z) for x in columns for z in lines if self.map.takes_planks((x, z)))
        self.rejected += rejected

    def _message(self, value: Any) -> str:
        if isinstance(value, str):
            return grid.harmless(value)
        self.rejected += value is not None
        return ""

    def drawing(self, agent: str) -> str:
        """The cells that an agent has seen, as rows; `?` for the others."""
        return grid.rows_of(
            self.map.width,
            self.map.height,
            lambda cell: self._symbol(cell, cell in self.known[agent]) if cell in self.seen[agent] else "?",
        )

    def _symbol(self, cell: Cell, known: bool) -> str:
        """One character per cell; a pillar shows its kind only where `known`."""
        symbol = self.map.at(cell)
        if symbol in "YN":
            symbol = symbol if known else "P"
            return symbol.lower() if cell in self.planks else symbol
        return "=" if cell in self.planks else symbol


def untouched(pillars: frozenset[Cell], planks: set[Cell]) -> set[Cell]:
    """Pillars without a plank on them or on a cell that shares an edge with them."""
    return {pillar for pillar in pillars if pillar not in planks and planks.isdisjoint(grid.beside(pillar))}


def is_joined(river: BridgeMap, planks: set[Cell]) -> bool:
    """Whether planks lead from S to T over cells that share edges."""
    reached, edge = {river.s}, [river.s]
    while edge:
        for cell in grid.beside(edge.pop()):
            if cell == river.t:
                return True
            if cell in planks and cell not in reached:
                reached.add(cell)
                edge.append(cell)
    return False


def bridge_of(river: BridgeMap) -> set[Cell]:
    """Planks that join S and T, touch every true pillar and, where the map allows that, no fake one."""
    water = {(x, z) for x in range(river.width) for z in range(river.height) if river.takes_planks((x, z))}
    free = {cell for cell in water if river.fake.isdisjoint((cell, *grid.beside(cell)))}
    planks = _way(river, free) or _way(river, water)
    for pillar in sorted(river.true):
        if untouched(frozenset((pillar,)), planks):
            planks |= set([cell for cell in (pillar, *grid.beside(pillar)) if cell in free][:1])
    return planks


def _way(river: BridgeMap, cells: set[Cell]) -> set[Cell]:
    """A shortest way over `cells` from S to T, without both; empty if there is none."""
    before: dict[Cell, Cell] = {}
    edge = [river.s]
    for cell in edge:
        for other in sorted(grid.beside(cell)):
            if other == river.t:
                way = [cell]
                while way[-1] in before:
                    way.append(before[way[-1]])
                return set(way) - {river.s}
            if other in cells and other not in before:
                before[other] = cell
                edge.append(other)
    return set()


def runs(cells: set[Cell]) -> list[tuple[int, int, int, int]]:
    """The cells as straight runs (x1, z1, x2, z2) along columns or rows, the topmost first."""
    left, found = set(cells), []
    for x, z in sorted(cells, key=lambda cell: (cell[1], cell[0])):
        if (x, z) in left:
            right = next(step for step in range(x, x + len(cells) + 1) if (step + 1, z) not in left)
            down = next(step for step in range(z, z + len(cells) + 1) if (x, step + 1) not in left)
            run = (x, z, right, z) if right - x >= down - z else (x, z, x, down)
            left -= {(column, row) for column in range(x, run[2] + 1) for row in range(z, run[3] + 1)}
            found.append(run)
    return found


# --- maps ----------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def read_map(name: str, rows: tuple[str, ...]) -> BridgeMap:
    """A map from its rows: `#` bank, `.` water, `Y` true and `N` fake pillars, one `S` and one `T`.

    Raises EnvError for any other content, or where no planks could join S and T.
    """
    text = "".join(rows)
    if not rows or len({len(row) for row in rows}) != 1 or not 1 <= len(rows[0]) <= MAX_SIDE or len(rows) > MAX_SIDE:
        raise EnvError(f"map {name!r} must be rows of one length, at most {MAX_SIDE} x {MAX_SIDE}.")
    if set(text) - set("#.YNST") or text.count("S") != 1 or text.count("T") != 1:
        raise EnvError(f"map {name!r} must hold one S, one T, and otherwise only # . Y N.")
    found: dict[str, set[Cell]] = {symbol: set() for symbol in "#.YNST"}
    for z, row in enumerate(rows):
        for x, symbol in enumerate(row):
            found[symbol].add((x, z))
    (s,), (t,) = found["S"], found["T"]
    river = BridgeMap(name, rows, s, t, frozenset(found["Y"]), frozenset(found["N"]))
    if not is_joined(river, found["."] | found["Y"] | found["N"]):
        raise EnvError(f"map {name!r} has no way from S to T; leave water between them.")
    return river


def _map_of(row: Row, index: int) -> BridgeMap:
    rows, name = row.get("map"), str(row.get("task_id", index))
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(line, str) for line in rows):
        raise EnvError(f"map {name!r} must have a field 'map', a list of rows.")
    return read_map(name, tuple(rows))


def _held_out(rows: Sequence[Row]) -> list[bool]:
    return [index >= len(rows) - max(1, len(rows) // 3) for index in range(len(rows))]


@lru_cache(maxsize=2048)
def generated(part: Part, size: tuple[int, int], task: int) -> BridgeMap:
    """Generated map number `task` of a part, named after it."""
    rows = grid.drawn(draw_map, "bridge_build", part, size, task)
    return read_map(f"{part}-{size[0]}x{size[1]}-{task}", rows)


def draw_map(rng: random.Random, size: tuple[int, int]) -> tuple[str, ...] | None:
    """Rows of a new map whose optimum is 0 by construction, or None where this draw left no room for fake pillars.

    A random way leads down from S to T. True pillars stand on it or share an edge with it; fake pillars do neither.
    """
    width, height = size
    s, t = rng.randrange(1, width - 1), rng.randrange(1, width - 1)
    way, x = set(), s
    for z in range(1, height - 1):
        left = height - 2 - z
        goal = t if not left else min(max(x + rng.randint(-3, 3) + round((t - x) / (left + 1)), 0), width - 1)
        way |= {(step, z) for step in range(min(x, goal), max(x, goal) + 1)}
        x = goal
    water = {(x, z) for x in range(width) for z in range(1, height - 1)}
    banks_of_way = {cell for step in way for cell in grid.beside(step) if cell in water} - way
    true = rng.sample(sorted(way), max(1, round(0.05 * len(water))))
    true += rng.sample(sorted(banks_of_way), min(len(banks_of_way), max(1, round(0.04 * len(water)))))
    away = sorted(water - way - banks_of_way)
    fakes = round(0.15 * len(water))
    if len(away) < max(1, fakes // 2):
        return None
    fake = set(rng.sample(away, min(len(away), fakes)))
    symbols = {**dict.fromkeys(true, "Y"), **dict.fromkeys(fake, "N"), (s, 0): "S", (t, height - 1): "T"}
    return tuple("".join(symbols.get((x, z), "." if 0 < z < height - 1 else "#") for x in range(width)) for z in range(height))
