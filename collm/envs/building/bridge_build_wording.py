"""The observations of `bridge_build`, in two wordings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from collm.envs.gathering.grid import MAX_MESSAGE
from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.building.bridge_build import BridgeBuild

PROBES = 3


def fill_line(x1: int, z1: int, x2: int, z2: int) -> str:
    """The command that lays planks on the rectangle between two cells."""
    return f"/fill {x1} {z1} {x2} {z2} oak_planks"


def _plain_first(env: BridgeBuild, agent: str) -> str:
    number = len(env.agents)
    alone = number == 1
    lines = [
        *_plain_scene(env, agent, 1),
        "# bank, . water, = plank, ? not seen, P pillar, Y true pillar, N fake pillar; p, y, n with a plank on it.",
        f"You are {agent}" + ("." if alone else f", one of {number} builders on two banks. The others see other cells."),
        "Join S and T (else 5 a turn). Touch true pillars (2 each), no fake ones (1 each). A probe costs 0.3"
        + ("." if alone else ", a word of comm 0.001."),
        f"cmds has at most {env.limit} commands. Other keys: probe, at most {PROBES} pillars [x, z] that you see; "
        f"path, at most {env.steps} steps [x, z], which show {env.view} cells around" + ("." if alone else "; comm, a text."),
        "",
        *_imperative(env, agent),
    ]
    return "\n".join(lines)


def _plain_later(env: BridgeBuild, agent: str, heard: Sequence[str]) -> str:
    return "\n".join([*heard, *_plain_scene(env, agent, env.turn + 2), "", *_imperative(env, agent)])


def _plain_scene(env: BridgeBuild, agent: str, turn: int) -> list[str]:
    x, z = env.place[agent]
    when = f"Turn {turn} of {env.turns}." if turn <= env.turns else "The end."
    return [
        f"The map, x 0 to {env.map.width - 1} to the right, z 0 to {env.map.height - 1} down. You are at {x} {z}. {when}",
        env.drawing(agent),
    ]


def _imperative(env: BridgeBuild, agent: str) -> list[str]:
    return [
        "Commands for the water that you see, /fill x1 z1 x2 z2 oak_planks:",
        *_columns(env, agent),
        "",
        'Write one JSON object with your commands, these or parts of them. It must begin with {"cmds": ["/fill',
    ]


def _columns(env: BridgeBuild, agent: str) -> list[str]:
    """The command that covers the water seen in each column."""
    columns: dict[int, list[int]] = {}
    for x, z in sorted(env.seen[agent] - env.planks):
        if env.map.takes_planks((x, z)):
            columns.setdefault(x, []).append(z)
    return [fill_line(x, rows[0], x, rows[-1]) for x, rows in columns.items()]


def _terse_first(env: BridgeBuild, agent: str) -> str:
    number, width, height = len(env.agents), env.map.width, env.map.height
    alone = number == 1
    role = f"You are {agent}" if alone else f"You are {agent}, one of {number} builders on two banks"
    comm = "" if alone else '"comm": "text", '
    lines = [
        f"{role}. Plank the river from S to T.",
        f"Map {width} x {height}: x 0..{width - 1} right, z 0..{height - 1} down. # bank . water = plank ? not seen.",
        "P pillar; a probe shows if it is true (Y) or fake (N). p y n: with a plank on it.",
        "Each turn costs 5 until planks join S and T edge to edge; 2 a true pillar with no plank on or beside it; "
        "1 a fake pillar with one; 0.3 a probe" + ("." if alone else "; 0.001 a word of comm."),
        f'Answer one JSON object: {{{comm}"probe": [[x,z]], "cmds": ["/fill x1 z1 x2 z2 oak_planks"], "path": [[x,z]]}}',
        f"At most {PROBES} probes of pillars you see, {env.limit} cmds, {env.steps} steps of path, diagonals too. "
        f"You see {env.view} cells around your path. Planks stay.",
    ]
    if not alone:
        lines.append(f"Others see other cells and read your comm ({MAX_MESSAGE} characters) next turn.")
    return "\n".join([*lines, _terse_scene(env, agent, 1)])


def _terse_later(env: BridgeBuild, agent: str, heard: Sequence[str]) -> str:
    return "\n".join([*heard, _terse_scene(env, agent, env.turn + 2)])


def _terse_scene(env: BridgeBuild, agent: str, turn: int) -> str:
    """The agent's position and the cells it has seen; `turn` counts from 1."""
    x, z = env.place[agent]
    when = f"Turn {turn} of {env.turns}." if turn <= env.turns else "The end."
    return f"{when} You are at {x},{z}. Map:\n{env.drawing(agent)}"


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
