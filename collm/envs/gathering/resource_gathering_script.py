"""The scripted player of `resource_gathering`, which knows the whole field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from collm.envs.gathering import grid
from collm.envs.gathering.grid import Cell

if TYPE_CHECKING:
    from collm.envs.gathering.resource_gathering import ResourceGathering


def answer(env: ResourceGathering, agent: str) -> str:
    """Walk to where the agent can gather most of what is needed, the nearest such cell, and tell one useful fact."""
    action: dict[str, Any] = {"path": [list(cell) for cell in _way(env, agent)]}
    for kind, cell in _news(env, agent):
        action["comm"] = {"kind": kind, "at": list(cell)}
        break
    return json.dumps(action)


def _way(env: ResourceGathering, agent: str) -> list[Cell]:
    """Steps straight toward the best cell."""
    here = env.place[agent]
    cells = {(x, y): _units(env, agent, (x, y)) for x in range(env.map.width) for y in range(env.map.height)}
    near = [cell for cell in cells if grid.steps_between(here, cell) <= env.steps]
    goal = min(near, key=lambda cell: (-cells[cell], grid.steps_between(here, cell), cell))
    if not cells[goal]:
        goal = min(
            (cell for cell in cells if cells[cell]), key=lambda cell: (grid.steps_between(here, cell), cell), default=here
        )
    way: list[Cell] = []
    (x, y), (to_x, to_y) = here, goal
    while (x, y) != goal and len(way) < env.steps:
        x, y = x + (to_x > x) - (to_x < x), y + (to_y > y) - (to_y < y)
        way.append((x, y))
    return way


def _units(env: ResourceGathering, agent: str, place: Cell) -> int:
    """Needed units that an agent could gather in one turn at a place."""
    within = [units for cell, units in env.left.items() if grid.distance(cell, place) <= env.reach]
    needed = {kind: env.goal[kind] - env.stock[kind] for kind in env.kinds[agent]}
    return sum(max(0, min(env.load, needed[kind], sum(units[kind] for units in within))) for kind in needed)


def _news(env: ResourceGathering, agent: str) -> Iterator[tuple[str, Cell]]:
    """Facts that are useful to another agent now."""
    for cell in sorted(env.seen[agent] & env.left.keys()):
        for other in env.agents:
            for kind in env.kinds[other]:
                known = other == agent or cell in env.seen[other] or (kind, cell) in env.told[other]
                if not known and env.left[cell][kind] and env.stock[kind] < env.goal[kind]:
                    yield kind, cell
