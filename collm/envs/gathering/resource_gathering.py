"""`resource_gathering`: gatherers with different tools, each of whom starts where the other's resources are."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from collm.envs.base import Outcome, TextEnv
from collm.envs.data import Row
from collm.envs.gathering import grid
from collm.envs.gathering import resource_gathering_script as script
from collm.envs.gathering.grid import NUM_GENERATED, Cell, Part
from collm.envs.gathering.resource_gathering_wording import PLAIN, TERSE
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError

KINDS = ("wood", "stone", "iron")
ROLES = (("wood",), ("stone", "iron"))
"""Kinds that the agents at the starts A and B gather."""
GOAL = (3, 3, 1)
"""Goal of generated fields: units of wood, stone, iron."""
KEYS = ("comm", "path")
MAX_SIDE = 64

Amounts = tuple[int, int, int]
Fact = tuple[str, Cell]

_AMOUNTS = re.compile(r"\((\d{1,4}),(\d{1,4}),(\d{1,4})\)", re.ASCII)
_SYMBOLS = {("wood",): "w", ("stone",): "s", ("iron",): "i", ("stone", "iron"): "m"}


@dataclass(frozen=True)
class Field:
    """One field. `amounts` holds (wood, stone, iron) of each cell that has any; `goal` is the amounts that the team needs.

    Example: read_field("a", ("A . (1,0,0)", "B . (0,1,1)"), (1, 1, 1))
    """

    name: str
    width: int
    height: int
    starts: tuple[Cell, Cell]
    amounts: Mapping[Cell, Amounts]
    goal: Amounts

    def kinds(self, cell: Cell) -> tuple[str, ...]:
        """The kinds on a cell at the beginning."""
        return tuple(kind for kind, amount in zip(KINDS, self.amounts.get(cell, (0, 0, 0))) if amount)

    def zone(self, kinds: Sequence[str], reach: int) -> set[Cell]:
        """Cells from which a unit of `kinds` is within reach at the beginning."""
        own = [cell for cell in self.amounts if set(kinds) & set(self.kinds(cell))]
        cells = ((x, y) for x in range(self.width) for y in range(self.height))
        return {cell for cell in cells if any(grid.distance(cell, other) <= reach for other in own)}


class ResourceGathering(TextEnv):
    """Gatherers with different tools see only the cells around their paths and collect wood, stone and iron together.

    `wood` gathers wood and starts at A among the minerals; `mineral` gathers stone and iron and starts at B in the forest. Each
    therefore sees what the other gathers. An answer is one JSON object, whose keys are both optional:
    {"comm": {"kind": "stone", "at": [x, y]}, "path": [[x, y], ...]}.
    In a turn, all agents first walk `path` (at most `steps` cells, also diagonally, over any cell) and see all cells within
    `view` cells of each. Then each agent in order gathers up to `load` units of each of its kinds from cells within Manhattan
    distance `reach` of its position, the nearest first. Then every other agent reads `comm`, one fact, once, at its next turn;
    a fact can be false. Anything else in an answer is rejected and counted, without a penalty. Gathered units are removed,
    which shows on every cell that an agent has seen; all agents read what the team still needs.

    Raw reward of a turn = 8 * progress gained + 7 if the goal is complete + 0.1 * useful facts + 0.05 * steps toward the own
    zone + 0.15 * first entries - 0.1 * wasted steps, where
        progress: fraction of the goal's units that are gathered; units of a kind above its goal do not count;
        useful fact: its sender had seen the cell, the kind is there when the turn ends, the team still needs it, and another
            agent that gathers this kind has neither seen the cell nor read this fact;
        zone: the cells from which an agent had some of its kinds within reach at the beginning;
        step toward the zone: a step that brings the agent closer to its zone than before in the episode; wasted step: any
        other step that ends outside the zone; first entry: the first step into the zone by an agent that began outside.
    Ends after `turns` turns or when the goal is complete.
    Perfect play completes the goal and returns 15, plus at most 0.1 per agent and turn for facts, and per agent 0.15 and 0.05
    per step for the way to its zone. Two agents that know the field complete every public and every generated field within 4
    turns. The greatest reward of the last turn depends on the turns before, so there is no `max_reward`: scores in % are given
    by the metric `success`, and partial completion by `progress`.
    Metrics: success (goal complete), progress, wood, stone, iron (units of the goal), facts (useful ones), wasted, rejected.

    Args:
        agents: how many gatherers, or their names. They start at A and B alternately, with that start's tools; a single
            gatherer starts at A with all tools.
        turns: how many turns an episode has.
        size: width and height of generated fields, 5 to 11 each.
        data: fields in the public format. Rows whose task_id contains `_eval_` are held out; without such rows, the last half.
        eval_data: a separate source of held-out fields.
        maps: your own fields, as rows of the public format ({"rows": [...], "goal": {...}}), played in both splits.
        view: how far a gatherer sees, in cells.
        steps: how many cells a gatherer may walk in a turn.
        reach: how far it gathers, in Manhattan distance.
        load: how many units of each of its kinds a gatherer takes in a turn; default: 1, or 3 for a single gatherer. With the
            default goal and 4 turns, load=1 leaves one turn for the way; a large load takes all units at once.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval". The generated fields of the two are disjoint.
    """

    max_reward = None
    has_messages = True

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 4,
        size: Sequence[int] = (9, 9),
        data: str | None = None,
        eval_data: str | None = None,
        maps: Sequence[dict[str, Any]] | None = None,
        view: int = 2,
        steps: int = 4,
        reach: int = 2,
        load: int | None = None,
        wording: Wording = "plain",
        split: str = "train",
    ):
        names = ("gatherer",) if agents == 1 else ("wood", "mineral")
        super().__init__(grid.team(agents, names), turns)
        grid.check_range(0, MAX_SIDE, view=view, steps=steps, reach=reach)
        alone = len(self.possible_agents) == 1
        self.load = (3 if alone else 1) if load is None else load
        if self.load < 1:
            raise EnvError(f"load={load} gathers nothing; set load=1 or more.")
        self.size = grid.checked_size(size, 5, 11)
        self.wording = texts_of(wording, PLAIN, TERSE)
        self.view, self.steps, self.reach = view, steps, reach
        rows = grid.task_rows(data, eval_data, maps, split, _held_out)
        self.maps = None if rows is None else [_field_of(row, index) for index, row in enumerate(rows)]
        self.part: Part = "eval" if split == "eval" else "train"
        self.num_tasks = NUM_GENERATED[self.part] if self.maps is None else len(self.maps)
        self.kinds = {agent: KINDS if alone else ROLES[index % 2] for index, agent in enumerate(self.possible_agents)}

    def map_of(self, task: int) -> Field:
        """The field of one task."""
        return generated(self.part, self.size, task) if self.maps is None else self.maps[task]

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.map = self.map_of(task)
        self.left = {cell: dict(zip(KINDS, amounts)) for cell, amounts in self.map.amounts.items()}
        self.goal = dict(zip(KINDS, self.map.goal))
        self.stock = dict.fromkeys(KINDS, 0)
        self.place = {agent: self.map.starts[index % 2] for index, agent in enumerate(self.agents)}
        self.seen = {agent: self._view([cell]) for agent, cell in self.place.items()}
        self.told: dict[str, set[Fact]] = {agent: set() for agent in self.agents}
        self.zones = {agent: self.map.zone(self.kinds[agent], self.reach) for agent in self.agents}
        self.closest = {agent: self._steps_to_zone(agent, cell) for agent, cell in self.place.items()}
        self.rejected = self.facts = self.wasted = 0
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        agents = list(answers)
        seen_before = {agent: set(self.seen[agent]) for agent in agents}
        said: dict[str, Fact] = {}
        toward = entries = wasted = 0
        for agent, answer in answers.items():
            action, rejected = grid.read_action(answer, KEYS)
            walked, refused = grid.walk(self.place[agent], action.get("path"), self.steps, self._inside)
            fact = self._fact(action.get("comm"))
            self.rejected += rejected + refused + int(fact is None and action.get("comm") is not None)
            if fact is not None:
                said[agent] = fact
            for cell in walked:
                away = self._steps_to_zone(agent, cell)
                toward += away < self.closest[agent]
                entries += away == 0 < self.closest[agent]
                wasted += away >= self.closest[agent] and away > 0
                self.closest[agent] = min(self.closest[agent], away)
            self.seen[agent] |= self._view(walked)
            self.place[agent] = walked[-1] if walked else self.place[agent]
        before = self._progress()
        for agent in agents:
            self._gather(agent)
        after = self._progress()
        complete = all(self.stock[kind] >= self.goal[kind] for kind in KINDS)
        facts = sum(self._tell(agent, fact, fact[1] in seen_before[agent]) for agent, fact in said.items())
        self.facts += facts
        self.wasted += wasted
        parts = {
            "progress": 8.0 * (after - before),
            "completion": 7.0 * complete,
            "facts": 0.1 * facts,
            "toward": 0.05 * toward,
            "entry": 0.15 * entries,
            "wasted": -0.1 * wasted,
        }
        metrics = {
            "success": float(complete),
            "progress": after,
            **{kind: float(min(self.stock[kind], self.goal[kind])) for kind in KINDS},
            "facts": float(self.facts),
            "wasted": float(self.wasted),
            "rejected": float(self.rejected),
        }
        observations = {}
        for agent in agents:
            heard = [f"{other} says: {kind} at {x},{y}" for other, (kind, (x, y)) in said.items() if other != agent]
            observations[agent] = self.wording.later(self, agent, heard, complete)
        return Outcome(sum(parts.values()), parts, observations, done=complete, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        return {agent: script.answer(self, agent) for agent in self.agents}

    def state(self) -> str:
        stand = " ".join(f"{agent} {x},{y}" for agent, (x, y) in self.place.items())
        rows = grid.rows_of(self.map.width, self.map.height, self._symbol)
        return f"turn {self.turn} of {self.turns} need {self.needed()}\n{stand}\n{self.listed(set(self.left))}\n{rows}"

    def num_parts(self, answer: str) -> int:
        return grid.num_entries(answer, KEYS)

    def task_name(self, task: int) -> str:
        return self.map_of(task).name

    def _view(self, cells: Sequence[Cell]) -> set[Cell]:
        return grid.view(cells, self.view, self.map.width, self.map.height)

    def _inside(self, cell: Cell) -> bool:
        return 0 <= cell[0] < self.map.width and 0 <= cell[1] < self.map.height

    def _steps_to_zone(self, agent: str, cell: Cell) -> int:
        """Steps from a cell to the agent's zone; 0 inside it, and 0 if the zone is empty."""
        return min((grid.steps_between(cell, other) for other in self.zones[agent]), default=0)

    def _progress(self) -> float:
        gathered = sum(min(self.stock[kind], self.goal[kind]) for kind in KINDS)
        return gathered / sum(self.goal.values())

    def _gather(self, agent: str) -> None:
        """Gather for one agent at its position; among cells at equal distance the upper, then the left one is first."""
        near = [(grid.distance(cell, self.place[agent]), cell[1], cell[0]) for cell in self.left]
        for kind in self.kinds[agent]:
            room = self.load
            for away, y, x in sorted(near):
                taken = min(room, self.left[x, y][kind]) if away <= self.reach else 0
                self.left[x, y][kind] -= taken
                self.stock[kind] += taken
                room -= taken

    def _fact(self, value: Any) -> Fact | None:
        """The fact in `comm`; None unless it holds exactly a kind and a cell of the field."""
        if not isinstance(value, dict) or value.keys() != {"kind", "at"} or value["kind"] not in KINDS:
            return None
        cell = grid.as_cell(value["at"])
        return (value["kind"], cell) if cell is not None and self._inside(cell) else None

    def _tell(self, sender: str, fact: Fact, was_seen: bool) -> bool:
        """Tell a fact to the other agents; returns whether it was useful."""
        kind, cell = fact
        true = was_seen and self.left.get(cell, {}).get(kind, 0) > 0 and self.stock[kind] < self.goal[kind]
        useful = False
        for agent, told in self.told.items():
            if agent != sender:
                useful |= true and kind in self.kinds[agent] and cell not in self.seen[agent] and fact not in told
                told.add(fact)
        return useful

    def drawing(self, agent: str) -> str:
        """The cells that an agent has seen, as rows; `?` for the others."""
        symbol = self._symbol
        return grid.rows_of(self.map.width, self.map.height, lambda cell: symbol(cell) if cell in self.seen[agent] else "?")

    def needed(self) -> str:
        """The units that the team still needs."""
        return _counted({kind: max(0, self.goal[kind] - self.stock[kind]) for kind in KINDS}) or "nothing"

    def listed(self, cells: set[Cell]) -> str:
        """The units left on `cells`, row by row."""
        kept = [(cell, _counted(self.left[cell])) for cell in sorted(cells & self.left.keys(), key=lambda c: (c[1], c[0]))]
        return ", ".join(f"{counted} at {x},{y}" for (x, y), counted in kept if counted) or "nothing"

    def _symbol(self, cell: Cell) -> str:
        here = tuple(kind for kind, amount in self.left.get(cell, {}).items() if amount)
        return _SYMBOLS.get(here, "x") if here else "."


def _counted(amounts: Mapping[str, int]) -> str:
    return " ".join(f"{kind} {amount}" for kind, amount in amounts.items() if amount)


# --- fields --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def read_field(name: str, rows: tuple[str, ...], goal: Amounts) -> Field:
    """A field from its rows of cells, separated by spaces: `.` empty, `A` and `B` the starts, `(wood,stone,iron)` amounts.

    Raises EnvError for any other content, or for a goal that exceeds what the field holds.
    """
    cells = [row.split() for row in rows]
    width = len(cells[0]) if cells else 0
    if not 1 <= width <= MAX_SIDE or len(cells) > MAX_SIDE or any(len(line) != width for line in cells):
        raise EnvError(f"field {name!r} must be rows of as many cells each, at most {MAX_SIDE} x {MAX_SIDE}.")
    starts: dict[str, Cell] = {}
    amounts: dict[Cell, Amounts] = {}
    for y, line in enumerate(cells):
        for x, cell in enumerate(line):
            found = _AMOUNTS.fullmatch(cell)
            if found:
                amounts[x, y] = (int(found[1]), int(found[2]), int(found[3]))
            elif cell in ("A", "B") and cell not in starts:
                starts[cell] = (x, y)
            elif cell != ".":
                raise EnvError(f"field {name!r} holds {cell!r:.40}; a cell is ., (wood,stone,iron), or once A and once B.")
    total = [sum(column) for column in zip(*amounts.values())] or [0, 0, 0]
    if len(starts) < 2 or not sum(goal) or any(not 0 <= need <= there for need, there in zip(goal, total)):
        raise EnvError(
            f"field {name!r} must hold A, B, and at least its goal of {goal} (wood, stone, iron), which asks for something."
        )
    return Field(name, width, len(cells), (starts["A"], starts["B"]), amounts, goal)


def _field_of(row: Row, index: int) -> Field:
    rows, goal, name = row.get("rows"), row.get("goal"), str(row.get("task_id", index))
    listed = isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(line, str) for line in rows)
    if not listed or not isinstance(goal, Mapping) or not all(type(goal.get(kind, 0)) is int for kind in KINDS):
        raise EnvError(
            f"field {name!r} must have the fields 'rows', a list of rows, and 'goal', numbers of wood, stone and iron."
        )
    wood, stone, iron = (goal.get(kind, 0) for kind in KINDS)
    return read_field(name, tuple(rows or ()), (wood, stone, iron))


def _held_out(rows: Sequence[Row]) -> list[bool]:
    marked = ["_eval_" in str(row.get("task_id", "")) for row in rows]
    return marked if any(marked) else [index >= len(rows) // 2 for index in range(len(rows))]


@lru_cache(maxsize=2048)
def generated(part: Part, size: tuple[int, int], task: int) -> Field:
    """Generated field number `task` of a part; its name holds part, size and number."""
    rows = grid.drawn(draw_field, "resource_gathering", part, size, task)
    return read_field(f"{part}-{size[0]}x{size[1]}-{task}", rows, GOAL)


def draw_field(rng: random.Random, size: tuple[int, int]) -> tuple[str, ...] | None:
    """Rows of a new field with a forest and minerals on opposite sides, or None where this draw holds less than GOAL.

    The stone and iron of the goal are within reach of A, its wood within reach of B, and A and B are at most 8 steps apart. An
    agent that knows where the other started can therefore gather from the second turn on.
    """
    width, height = size
    dx, dy = rng.choice(((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)))
    start_a = _side(rng, width, dx), _side(rng, height, dy)
    start_b = _side(rng, width, -dx), _side(rng, height, -dy)
    free = [(x, y) for x in range(width) for y in range(height) if (x, y) not in (start_a, start_b)]
    near_b = [cell for cell in free if grid.distance(cell, start_b) <= min(2, grid.distance(cell, start_a) - 1)]
    near_a = [cell for cell in free if grid.distance(cell, start_a) <= 2 and cell not in near_b]
    amounts: dict[Cell, Amounts] = {}
    woods = rng.sample(near_b, min(len(near_b), rng.randint(3, 5)))
    minerals = rng.sample(near_a, min(len(near_a), rng.randint(3, 5)))
    for cell in woods:
        amounts[cell] = (rng.randint(1, 3), 0, 0)
    for index, cell in enumerate(minerals):
        amounts[cell] = (0, rng.randint(1, 3), int(index == 0 or rng.random() < 0.4))
    if any(sum(amount[kind] for amount in amounts.values()) < need for kind, need in enumerate(GOAL)):
        return None
    far = [cell for cell in free if cell not in amounts and cell not in near_a and cell not in near_b]
    for cell in rng.sample(far, min(len(far), rng.randint(0, width * height // 20))):
        amounts[cell] = rng.choice(((1, 0, 0), (2, 0, 0), (0, 1, 0), (0, 2, 1), (1, 1, 0)))
    marks = {start_a: "A", start_b: "B"}
    return tuple(
        " ".join(marks.get((x, y)) or ("({},{},{})".format(*amounts[x, y]) if (x, y) in amounts else ".") for x in range(width))
        for y in range(height)
    )


def _side(rng: random.Random, length: int, direction: int) -> int:
    """A coordinate near the low end (direction 1), near the high end (-1), or anywhere except the edges (0)."""
    if direction == 0:
        return rng.randrange(1, length - 1)
    return 1 + rng.randrange(max(1, length // 4)) if direction > 0 else length - 2 - rng.randrange(max(1, length // 4))
