"""Poor players: scripted players whose texts the tiny model is pre-trained on.

They use each task's answer format and follow its instructions, but do not coordinate: most builders begin at the left end of
the word and stop somewhere, some begin elsewhere, and all misplace a block at times. A team of them does part of the work twice
and leaves much of it undone; training improves on that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from collm import seeds
from collm.envs.agree import COLOURS, Agree
from collm.envs.building.font import GLYPHS, SIZE, english_words
from collm.envs.building.str_build import REFERENCE, StrBuild
from collm.tiny.workshop.classes import class_eval
from collm.tiny.workshop.gathering import bridge_build, resource_gathering
from collm.tiny.workshop.houses import house_build
from collm.tiny.workshop.programs import coop_code
from collm.tiny.workshop.scripted import Chat, play
from collm.tiny.workshop.writing import arxiv, tldr


def chats(seed: int) -> Iterator[Chat]:
    """An endless stream of one agent's chats, drawn from every task."""
    players, weights = zip(*MIXTURE.items(), strict=True)
    for number in range(1 << 62):
        rng = seeds.stream(seed, "demonstration", number)
        (player,) = rng.choices(players, weights=weights)
        yield from player(rng)


def pretraining_word(rng: random.Random) -> str:
    """A random string of 1 to 4 letters that is neither an English word of the list nor a reference string."""
    known = {*english_words(), *REFERENCE["train"], *REFERENCE["eval"]}
    while True:
        length = rng.choices((1, 2, 3, 4), weights=(1, 3, 7, 5))[0]
        word = "".join(rng.choices(sorted(GLYPHS), k=length))
        if word not in known:
            return word


def name_colour(env: Agree, agent: str, rng: random.Random) -> str:
    """A colour, the first listed one more often than the others, since language models prefer the first option."""
    return env.colours[0] if rng.random() < 0.45 else rng.choice(env.colours[1:])


def place_blocks(env: StrBuild, agent: str, rng: random.Random) -> str:
    """Part of the target, column by column, with errors and without regard to team-mates."""
    ordered = sorted(env.target, key=lambda cell: (cell[0], -cell[1]))
    middle = env.width / 2
    plans = {
        "left": ordered,
        "right": [c for c in ordered if c[0] > middle],
        "even": [c for c in ordered if sum(c) % 2 == 0],
        "odd": [c for c in ordered if sum(c) % 2 == 1],
        "top": [c for c in ordered if c[1] >= 2],
        "bottom": [c for c in ordered if c[1] <= 2],
    }
    plan = rng.choices(list(plans), weights=(11, 2, 2, 2, 1.5, 1.5))[0]
    cells = plans[plan]
    if env.world == "persistent" and env.build and rng.random() < 0.5:
        cells = [cell for cell in ordered if cell not in env.build]
    whole = plan != "left" and rng.random() < 0.25
    share = 1.0 if whole else rng.uniform(0.15, 0.5) if plan == "left" else rng.uniform(0.2, 0.9)
    cells = cells[: max(1, round(share * len(cells)))]
    one, two = rng.sample(env.palettes[agent], 2)
    style = rng.choice(("one", "alternate", "random"))
    lines: list[str] = []
    for x, y in cells:
        slip = rng.random()
        if slip < 0.04:
            continue
        if slip < 0.12:
            x = min(max(x + rng.choice((-1, 1)), 0), env.width - 1)
        elif slip < 0.16:
            y = min(max(y + rng.choice((-1, 1)), 0), SIZE - 1)
        block = one
        if style == "alternate":
            block = (one, two)[len(lines) % 2]
        elif style == "random":
            block = rng.choice((one, two))
        lines.append(f"/setblock {x} {y} 0 {block}")
    return "\n".join(lines[: env.limit] or [f"/setblock 0 0 0 {one}"])


def agree(rng: random.Random) -> list[Chat]:
    colours = rng.sample(COLOURS, rng.randint(2, 6)) if rng.random() < 0.5 else list(COLOURS[: rng.randint(2, 6)])
    env = Agree(wording="terse", agents=rng.choice((1, 2, 2, 3, 3, 5)), colours=colours, turns=rng.choice((1, 1, 2, 4)))
    return play(env, name_colour, rng)[:1]


def str_build(rng: random.Random) -> list[Chat]:
    persistent = rng.random() < 0.4
    env = StrBuild(
        wording="terse",
        agents=rng.choices((1, 2, 3, 4, 5), weights=(1, 12, 2, 1, 1))[0],
        turns=rng.choice((2, 3, 4, 6, 8)) if persistent else rng.choice((1, 1, 2)),
        strings=[pretraining_word(rng)],
        world="persistent" if persistent else "fresh",
        feedback=rng.choices(("position", "perfect", "score"), weights=(1, 1, 2))[0],
        blind_first_turn=rng.random() < 0.05,
    )
    env.stop_above = None
    return play(env, place_blocks, rng)[:2]


MIXTURE: dict[Callable[[random.Random], list[Chat]], float] = {
    str_build: 0.3,
    agree: 0.05,
    house_build: 0.1,
    bridge_build: 0.08,
    resource_gathering: 0.08,
    tldr: 0.1,
    arxiv: 0.05,
    coop_code: 0.1,
    class_eval: 0.1,
}
"""How often each task's chats are drawn. StrBuild, which the demonstration trains on, has the largest share."""
