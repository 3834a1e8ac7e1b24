"""The observations of `resource_gathering`, in two wordings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from collm.envs.gathering import grid
from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.gathering.resource_gathering import ResourceGathering

SYMBOLS = "? not seen, . empty, w wood, s stone, i iron, m stone and iron, x other mix"


def _plain_first(env: ResourceGathering, agent: str) -> str:
    alone = len(env.agents) == 1
    others = "".join(f"; {other} gathers {_listing(env.kinds[other])}" for other in env.agents if other != agent)
    lines = [
        f"You are {agent} and gather {_listing(env.kinds[agent])}{others}.",
        f"You walk at most {env.steps} steps a turn and take up to {env.load} of each of yours within {env.reach} cells, "
        f"counted along x plus y, of where you stop. You see {env.view} cells around your steps. "
        "The team earns 8 for its goal, by shares, and 7 once it is complete.",
    ]
    if not alone:
        lines.append(
            'The key comm may follow: one thing that you see and they need, such as "comm": {"kind": "stone", "at": [2, 3]}.'
        )
    return "\n".join([*lines, "", *_plain_scene(env, agent, 1)])


def _plain_later(env: ResourceGathering, agent: str, heard: Sequence[str], complete: bool) -> str:
    return "\n".join([*heard, *_plain_scene(env, agent, env.turn + 2, complete)])


def _plain_scene(env: ResourceGathering, agent: str, turn: int, complete: bool = False) -> list[str]:
    width, height, (x, y) = env.map.width, env.map.height, env.place[agent]
    when = f"Turn {turn} of {env.turns}." if turn <= env.turns and not complete else "The end."
    beside = sorted(grid.view([(x, y)], 1, width, height) - {(x, y)})
    inward = min(beside, key=lambda cell: grid.distance(cell, (width // 2, height // 2)))
    return [
        f"The field, x 0 to {width - 1} to the right, y 0 to {height - 1} down. {SYMBOLS}:",
        env.drawing(agent),
        f"Seen: {env.listed(env.seen[agent])}",
        f"{when} The team needs: {env.needed()}",
        f"You are at [{x}, {y}]. Each step goes to a neighbour, diagonals too.",
        "",
        'Write one JSON object with your steps. It must begin with {"path": and is, for example: '
        + json.dumps({"path": [list(inward)]}),
    ]


def _terse_first(env: ResourceGathering, agent: str) -> str:
    number, width, height = len(env.agents), env.map.width, env.map.height
    alone = number == 1
    others = ", ".join(f"{other} gathers {_listing(env.kinds[other])}" for other in env.agents if other != agent)
    role = f"You are {agent}" if alone else f"You are {agent}, one of {number} gatherers"
    comm = "" if alone else '"comm": {"kind": "stone", "at": [x,y]}, '
    lines = [
        f"{role}. You gather {_listing(env.kinds[agent])}" + ("." if alone else f"; {others}."),
        f"Field {width} x {height}: x 0..{width - 1} right, y 0..{height - 1} down. ? not seen . empty w wood s stone "
        "i iron m stone and iron x other mix.",
        f"Each turn walk at most {env.steps} steps, diagonals too; you see {env.view} cells around your path. Where you "
        f"stop you take up to {env.load} of each of yours within {env.reach} cells, counted along x plus y.",
        "The team earns 8 for the goal, by shares, and 7 once it is complete. Finding what you gather earns a little; "
        "other steps outside of its zone cost a little.",
        f'Answer one JSON object: {{{comm}"path": [[x,y]]}}',
    ]
    if not alone:
        lines.append(
            "You begin where others gather. They read your comm next turn; a new and true fact they need earns a little."
        )
    return "\n".join([*lines, _terse_scene(env, agent, 1)])


def _terse_later(env: ResourceGathering, agent: str, heard: Sequence[str], complete: bool) -> str:
    return "\n".join([*heard, _terse_scene(env, agent, env.turn + 2, complete)])


def _terse_scene(env: ResourceGathering, agent: str, turn: int, complete: bool = False) -> str:
    """The agent's position, the cells it has seen, and what the team needs; `turn` counts from 1."""
    x, y = env.place[agent]
    when = f"Turn {turn} of {env.turns}." if turn <= env.turns and not complete else "The end."
    seen = env.listed(env.seen[agent])
    return f"{when} You are at {x},{y}. Need: {env.needed()}\nSeen: {seen}\n{env.drawing(agent)}"


def _listing(kinds: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(kinds[:-1]), kinds[-1])))


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
