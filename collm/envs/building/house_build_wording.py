"""The observations of `house_build`, in two wordings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collm.envs.building.houses import listing, rectangles
from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.building.house_build import HouseBuild

HP = 5
SHOWN_WRONG = 20
"""How many wrong cells the feedback "perfect" lists."""


def _plain_first(env: HouseBuild, agent: str) -> str:
    number, (width, height, depth) = len(env.agents), env.house.size
    shared = ", ".join(f"{block} {count}" for block, count in env.limits.items())
    role = "" if number == 1 else f", one of {number} builders, who build it together"
    lines = [
        "The house, as boxes x1 y1 z1 x2 y2 z2 block:",
        *_boxes(env),
        "",
        f"You are {agent}{role}. x is 0 to {width - 1}, y 0 to {height - 1} and z 0 to {depth - 1}; all cells are air now. "
        + ("Every cell counts." if env.reward_mode == "match" else "Cells of the house pay, others cost."),
        f"Cells that you may fill: {shared}. A box with more cells is dropped.",
        f"Spiders take {' '.join(map(str, env.spiders))} of {HP} HP unless "
        f"{'you write' if number == 1 else 'one of you writes'} the line /kill.",
        "",
        _imperative(env, agent),
    ]
    return "\n".join(lines)


def _plain_later(env: HouseBuild, agent: str, total: float) -> str:
    wrong = env.wrong()
    lines = [f"Reward: {total:.2f}"] if env.feedback == "score" else []
    if env.feedback != "score" and not wrong:
        lines.append("All cells are right.")
    elif env.feedback == "position":
        lines.append(_layers(env))
    elif env.feedback == "perfect":
        lines.append(_wrong_cells(env))
    dropped = f" {env.dropped[agent]} of your boxes were dropped." if env.dropped[agent] else ""
    return "\n".join([*lines, f"HP {env.hp()}.{dropped} The box is empty again.", "", _imperative(env, agent)])


def _boxes(env: HouseBuild) -> list[str]:
    """The commands that build the house."""
    return [
        f"/fill {part.x1} {y} {part.z1} {part.x2} {y} {part.z2} {part.block}"
        for y in range(env.house.size[1])
        for part in rectangles(env.house.blocks, y)
    ]


def _imperative(env: HouseBuild, agent: str) -> str:
    number, boxes = len(env.possible_agents), _boxes(env)
    share = "the boxes" if number == 1 else "half of the boxes" if number == 2 else f"one of {number} parts of the boxes"
    return (
        f"Write one line for each of {share}, at most {env.limit} lines. Each line must begin with: /fill, "
        f"for example: {boxes[env.possible_agents.index(agent) * len(boxes) // number]}"
    )


def _terse_first(env: HouseBuild, agent: str) -> str:
    number = len(env.agents)
    width, height, depth = env.house.size
    alone = number == 1
    role = f"You are {agent}." if alone else f"You are {agent}, one of {number} builders."
    shared = ", ".join(f"{block} {count}" for block, count in env.limits.items())
    hits = " ".join(map(str, env.spiders))
    exact = env.reward_mode == "match"
    lines = [
        f"{role} Build this house{'.' if alone else ' together.'}",
        f"Box: x 0..{width - 1}, y 0..{height - 1} up, z 0..{depth - 1}, all air. "
        + ("Every cell counts." if exact else "Planned cells pay, others cost."),
        "Plan, for each layer y: block x1 z1 x2 z2",
        listing(env.house.blocks),
        f"Cells you may fill: {shared}. A fill past that is dropped whole.",
        f"Spiders hit {hits} of {HP} HP unless {'you write' if alone else 'one writes'} /kill",
        f"At most {env.limit} lines: /fill x1 y1 z1 x2 y2 z2 block",
    ]
    return "\n".join(lines)


def _terse_later(env: HouseBuild, agent: str, total: float) -> str:
    number, wrong = len(env.possible_agents), env.wrong()
    lines = [f"Reward: {total:.2f}"] if env.feedback == "score" else []
    if env.feedback != "score" and not wrong:
        lines.append("All cells are right.")
    elif env.feedback == "position":
        lines.append(_layers(env))
        if number > 1:
            lines.append(f"Take about {'half' if number == 2 else f'1/{number}'} of each layer.")
    elif env.feedback == "perfect":
        lines.append(_wrong_cells(env))
    dropped = f" Your dropped fills: {env.dropped[agent]}." if env.dropped[agent] else ""
    lines.append(f"HP {env.hp()}.{dropped} The box is empty again.")
    return "\n".join(lines)


def _layers(env: HouseBuild) -> str:
    layers = [y for _, y, _ in env.wrong()]
    return "Wrong cells: " + ", ".join(f"y {y} {layers.count(y)}" for y in sorted(set(layers)))


def _wrong_cells(env: HouseBuild) -> str:
    wrong = env.wrong()
    listed = ", ".join(f"{x} {y} {z} {env.house.blocks.get((x, y, z), 'air')}" for x, y, z in wrong[:SHOWN_WRONG])
    more = f" and {len(wrong) - SHOWN_WRONG} more" if len(wrong) > SHOWN_WRONG else ""
    return f"Wrong cells should be: {listed}{more}"


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
