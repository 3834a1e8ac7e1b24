"""Poor players of the two environments with messages, for pre-training.

They nearly always use the correct format, but walk at random, build along arbitrary columns, and rarely send useful messages.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from collm.envs.building.bridge_build import COMMANDS, PROBES, BridgeBuild
from collm.envs.building.bridge_build import draw_map as draw_river
from collm.envs.gathering import grid
from collm.envs.gathering.grid import Cell
from collm.envs.gathering.resource_gathering import GOAL, KINDS, ResourceGathering, draw_field
from collm.tiny.workshop.scripted import Chat, play

SIDES = {
    "bridge_build": ((5, 5), (7, 6), (7, 6), (7, 6), (9, 8), (13, 11)),
    "resource_gathering": ((5, 5), (6, 6), (6, 6), (7, 7), (9, 9)),
}
SMALL_TALK = ("i build here", "you go on", "ok", "i come to you", "look for pillars", "no pillars here", "where are you")


def bridge_build(rng: random.Random) -> list[Chat]:
    """One to three agents' chats of an episode on a map kept for pre-training."""
    size = rng.choice(SIDES["bridge_build"])
    rows = grid.drawn(draw_river, "bridge_build", "pretraining", size, rng.randrange(1 << 30))
    env = BridgeBuild(
        wording="terse",
        agents=rng.choices((1, 2, 3), weights=(1, 10, 1))[0],
        turns=rng.choice((2, 3, 4, 4)),
        maps=[{"task_id": "pretraining", "map": rows}],
        view=rng.choice((1, 2, 3, 3)),
    )
    return play(env, plank_somewhere, rng)


def resource_gathering(rng: random.Random) -> list[Chat]:
    """One to three agents' chats of an episode on a field kept for pre-training."""
    size = rng.choice(SIDES["resource_gathering"])
    rows = grid.drawn(draw_field, "resource_gathering", "pretraining", size, rng.randrange(1 << 30))
    goal = dict(zip(KINDS, GOAL))
    env = ResourceGathering(
        wording="terse",
        agents=rng.choices((1, 2, 3), weights=(1, 10, 1))[0],
        turns=rng.choice((2, 3, 4, 4)),
        maps=[{"task_id": "pretraining", "rows": rows, "goal": goal}],
        view=rng.choice((1, 2, 2)),
    )
    return play(env, wander, rng)


def plank_somewhere(env: BridgeBuild, agent: str, rng: random.Random) -> str:
    """Some planks from where the builder stands, in any direction, some probes, a step or two, and small talk."""
    river, (x, z) = env.map, env.place[agent]
    seen = sorted(env.seen[agent])
    pillars = [cell for cell in seen if river.at(cell) in "YN"]
    unknown = [cell for cell in pillars if cell not in env.known[agent]]
    action: dict[str, Any] = {}
    if len(env.agents) > 1 and rng.random() < 0.45:
        action["comm"] = _remark(env, agent, pillars, rng)
    if unknown and rng.random() < 0.35:
        action["probe"] = [list(cell) for cell in rng.sample(unknown, min(len(unknown), rng.randint(1, PROBES)))]
    commands = []
    for _ in range(rng.choices((0, 1, 2, 3), weights=(3, 6, 4, 2))[0]):
        kind = rng.random()
        if kind < 0.35:  # a column, rarely the whole river
            column, deep = min(max(x + rng.randint(-2, 2), 0), river.width - 1), rng.randint(1, max(1, river.height - 2))
            first, last = (1, deep) if z < river.height / 2 else (river.height - 2, river.height - 1 - deep)
            commands.append((column, first, column, last))
        elif kind < 0.6:  # a row
            row, left, right = rng.randint(1, river.height - 2), rng.randrange(river.width), rng.randrange(river.width)
            commands.append((min(left, right), row, max(left, right), row))
        elif kind < 0.85 and pillars:  # a pillar in view, true or fake, or beside it
            cell = rng.choice(pillars)
            commands.append((*cell, *cell))
        else:  # a small patch in view
            cell = rng.choice(seen)
            commands.append(
                (*cell, min(cell[0] + rng.randint(0, 2), river.width - 1), min(cell[1] + rng.randint(0, 1), river.height - 1))
            )
    if commands:
        action["cmds"] = [f"/fill {a} {b} {c} {d} oak_planks" for a, b, c, d in commands[: COMMANDS // len(env.agents)]]
    path = _stroll((x, z), rng.randint(0, env.steps), rng, lambda cell: river.at(cell) != "#")
    if path:
        action["path"] = path
    return _answer(action, rng)


def wander(env: ResourceGathering, agent: str, rng: random.Random) -> str:
    """Steps toward something seen or told of, across the field, or nowhere; sometimes a fact, useful, useless or false."""
    action: dict[str, Any] = {}
    if len(env.agents) > 1 and rng.random() < 0.6:
        seen = [cell for cell in sorted(env.seen[agent]) if any(env.left.get(cell, {}).values())]
        cell = rng.choice(seen or sorted(env.seen[agent]))
        there = [kind for kind in KINDS if env.left.get(cell, {}).get(kind)]
        if rng.random() < 0.25:
            cell = (rng.randrange(env.map.width), rng.randrange(env.map.height))
        kind = rng.choice(there) if there and rng.random() < 0.75 else rng.choice(KINDS)
        action["comm"] = {"kind": kind, "at": list(cell)}
    inside = range(env.map.width), range(env.map.height)
    here, own = env.place[agent], env.kinds[agent]
    sources = [cell for cell in sorted(env.seen[agent]) if any(env.left.get(cell, {}).get(kind) for kind in own)]
    sources += sorted(cell for kind, cell in env.told[agent] if kind in own)
    mood = rng.random()
    if sources and mood < 0.2:
        path = _toward(here, rng.choice(sources), rng.randint(0, env.steps))
    elif not sources and mood < 0.25:
        path = _toward(here, (env.map.width - 1 - here[0], env.map.height - 1 - here[1]), rng.randint(1, env.steps))
    elif sources and mood < 0.35:
        path = []
    else:
        path = _stroll(here, rng.randint(0, env.steps), rng, lambda cell: cell[0] in inside[0] and cell[1] in inside[1])
    if path:
        action["path"] = path
    return _answer(action, rng)


def _remark(env: BridgeBuild, agent: str, pillars: list[Cell], rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.3 or (kind < 0.8 and not pillars):
        return rng.choice(SMALL_TALK)
    if kind < 0.8:
        x, z = rng.choice(pillars)
        told = {"Y": "true", "N": "fake"}[env.map.at((x, z))] if (x, z) in env.known[agent] else "pillar"
        return f"{told} {x},{z}"
    x, z = env.place[agent]
    return f"i am at {x},{z}"


def _toward(here: Cell, target: Cell, steps: int) -> list[list[int]]:
    """Up to `steps` cells of the straight way to `target`."""
    path: list[list[int]] = []
    while here != target and len(path) < steps:
        here = (
            here[0] + (target[0] > here[0]) - (target[0] < here[0]),
            here[1] + (target[1] > here[1]) - (target[1] < here[1]),
        )
        path.append(list(here))
    return path


def _stroll(start: Cell, steps: int, rng: random.Random, is_open: Callable[[Cell], bool]) -> list[list[int]]:
    """Up to `steps` cells in one direction that changes now and then."""
    ways = [(dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1) if dx or dy]
    (x, y), (dx, dy) = start, rng.choice(ways)
    path: list[list[int]] = []
    for _ in range(steps):
        for _ in range(4):
            if is_open((x + dx, y + dy)) and rng.random() > 0.15:
                break
            dx, dy = rng.choice(ways)
        if rng.random() > 0.03 and not is_open((x + dx, y + dy)):
            break
        x, y = x + dx, y + dy
        path.append([x, y])
    return path


def _answer(action: dict[str, Any], rng: random.Random) -> str:
    """Compact JSON; once in a while damaged, as weak models write it."""
    text = json.dumps(action, separators=(",", ":"))
    return text[: rng.randint(1, len(text))] if rng.random() < 0.03 else text
