"""Poor builders of houses, for pre-training.

They nearly always use the correct format and take their fills from the blueprint, but do not coordinate: most begin at the
floor and stop somewhere, some begin elsewhere or take one side; some fills are misplaced or exceed the builder's limits.
"""

from __future__ import annotations

import random

from collm.envs.building.house_build import HouseBuild
from collm.envs.building.houses import SYMBOLS, Layers, Rectangle, Size, generated_layers, rectangles
from collm.tiny.workshop.scripted import Chat, play

SIZES: tuple[Size, ...] = ((3, 3, 3), (4, 3, 4), (4, 3, 4), (4, 3, 4), (4, 3, 4), (4, 4, 4), (5, 4, 5))
MOST_LINES = 10


def house_build(rng: random.Random) -> list[Chat]:
    """One or two agents' chats of an episode on a house kept for pre-training."""
    size = rng.choice(SIZES)
    env = HouseBuild(
        wording="terse",
        agents=rng.choices((1, 2, 3), weights=(1, 12, 1))[0],
        turns=rng.choice((1, 1, 2)),
        houses=[public_row(generated_layers("pretraining", size, rng.randrange(1 << 30)), size)],
        reward=rng.choices(("match", "coverage"), weights=(2, 1))[0],
        feedback=rng.choices(("score", "position", "perfect"), weights=(4, 1, 1))[0],
    )
    env.stop_above = None
    return play(env, fill_boxes, rng)[:2]


def public_row(layers: Layers, size: Size) -> dict[str, object]:
    """A drawn house as a row of the public format."""
    listed = [{"y": y, "rows": list(rows)} for y, rows in enumerate(layers)]
    return {"task_id": "pretraining", "inventory": SYMBOLS, "target_spec": {"size": list(size), "layers": listed}}


def fill_boxes(env: HouseBuild, agent: str, rng: random.Random) -> str:
    """Some of the blueprint's rectangles in order, whole or in part, with errors and without regard to team-mates."""
    width, height, depth = env.house.size
    parts = [(y, part) for y in range(height) for part in rectangles(env.house.blocks, y)]
    plans = {
        "bottom": parts,
        "top": parts[::-1],
        "left": [(y, part) for y, part in parts if part.x1 + part.x2 < width],
        "right": [(y, part) for y, part in parts if part.x1 + part.x2 >= width - 1],
        "upper": [(y, part) for y, part in parts if y > 0],
        "one block": [(y, part) for y, part in parts if part.block == rng.choice(parts)[1].block],
    }
    plan = rng.choices(list(plans), weights=(9, 2, 2, 2, 2, 1))[0]
    share = rng.uniform(0.2, 0.7) if plan == "bottom" else rng.uniform(0.3, 1.0)
    chosen = plans[plan] or parts
    chosen = chosen[: min(MOST_LINES, max(1, round(share * len(chosen))))]
    cut = rng.choices(("whole", "first", "last", "any"), weights=(3, 2, 2, 2))[0]
    lines = []
    for y, part in chosen:
        slip = rng.random()
        if slip < 0.04:
            continue
        x1, z1, x2, z2 = _cut(part, cut if cut != "any" else rng.choice(("whole", "first", "last")))
        block = part.block
        if slip < 0.08:
            x1, x2 = (min(max(x + rng.choice((-1, 1)), 0), width - 1) for x in (x1, x2))
        elif slip < 0.12:
            z1, z2 = (min(max(z + rng.choice((-1, 1)), 0), depth - 1) for z in (z1, z2))
        elif slip < 0.17:
            block = rng.choice((*env.limits, "air"))
        y2 = min(y + 1, height - 1) if slip > 0.95 else y
        lines.append(f"/fill {x1} {y} {z1} {x2} {y2} {z2} {block}")
    if rng.random() < 0.2:
        lines.insert(rng.choice((0, len(lines))), "/kill")
    return "\n".join(lines or ["/kill"])


def _cut(part: Rectangle, how: str) -> tuple[int, int, int, int]:
    """The corners of a rectangle, or of one half of it along its longer side."""
    x1, z1, x2, z2 = part.x1, part.z1, part.x2, part.z2
    if how != "whole" and x2 - x1 >= z2 - z1:
        x1, x2 = (x1, (x1 + x2) // 2) if how == "first" else ((x1 + x2 + 1) // 2, x2)
    elif how != "whole":
        z1, z2 = (z1, (z1 + z2) // 2) if how == "first" else ((z1 + z2 + 1) // 2, z2)
    return x1, z1, x2, z2
