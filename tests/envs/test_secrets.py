"""Nothing but what a world means to pass on crosses between agents: a secret planted in one agent's answers shows in nobody
else's texts, in any registered world. Messages that are meant to cross are tested with the worlds that have them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import pytest
from test_fuzz import varied, written_by_players

from collm import seeds
from collm.envs.catalogue import ENVIRONMENTS, find, make
from collm.learning.readings import read

SECRET = "zyzzogeton"


def before(text: str, rng: random.Random) -> str:
    return f"{SECRET}\n{text}"


def after(text: str, rng: random.Random) -> str:
    return f"{text}\n{SECRET}"


def as_comment(text: str, rng: random.Random) -> str:
    return f"# {SECRET}\n{text}  # {SECRET}"


def for_a_word(text: str, rng: random.Random) -> str:
    words = list(re.finditer(r"\w+", text))
    if not words:
        return SECRET
    word = rng.choice(words)
    return f"{text[: word.start()]}{SECRET}{text[word.end() :]}"


def as_a_field(text: str, rng: random.Random) -> str:
    try:
        action = json.loads(text)
    except ValueError:
        return text
    return json.dumps({**action, SECRET: SECRET, "note": [SECRET]}) if isinstance(action, dict) else text


PLACES: list[Callable[[str, random.Random], str]] = [before, after, as_comment, for_a_word, as_a_field]


def without_message(text: str) -> str:
    """The answer without what it means to tell: the world passes that on, on purpose."""
    try:
        action = json.loads(text)
    except ValueError:
        return re.sub(r'"comm".*', "", text)
    return json.dumps({key: value for key, value in action.items() if key != "comm"}) if isinstance(action, dict) else text


@pytest.mark.parametrize("name", [n for n in ENVIRONMENTS if not getattr(find(n), "waits", False)])
def test_a_secret_of_one_agent_shows_in_nobody_elses_texts(name: str) -> None:
    crossing(name, 60)


@pytest.mark.parametrize("name", [n for n in ENVIRONMENTS if getattr(find(n), "waits", False)])
def test_a_secret_does_not_cross_in_a_world_that_waits(name: str) -> None:
    crossing(name, 6)


def crossing(name: str, episodes: int) -> None:
    rng = seeds.stream(7, "secret", name)
    written = [without_message(text) for text in written_by_players(name, rng)]
    searched = 0
    for _ in range(episodes):
        env = varied(name, rng)
        observations, _ = env.reset(seed=rng.getrandbits(32))
        spy = rng.choice(env.agents)
        while env.agents:
            answers = {agent: rng.choice(written) for agent in env.agents}
            answers[spy] = rng.choice(PLACES)(answers[spy], rng)
            planted = SECRET in answers[spy]
            observations, *_ = env.step(answers)
            for agent, text in observations.items():
                if agent != spy:
                    searched += planted
                    assert SECRET not in text.lower(), f"{name}: {agent} reads what {spy} wrote:\n{answers[spy]}\n---\n{text}"
    assert searched > episodes / 4  # one-agent worlds, and those of one turn, have little to search


def of_the_others(name: str, texts: list[list[str]], **options: object) -> list[str]:
    """Observations and readings of all agents but the first one, which writes `texts`; the others always write the same."""
    rng = seeds.stream(3, "own view", name)
    env = make(name, **options)
    firsts, _ = env.reset(seed=1, options={"task": 0})
    spy, *others = env.agents
    found = [repr(firsts[agent]) for agent in others]
    for answers in texts:
        observations, *_ = env.step({spy: "\n".join(answers), **{agent: PLAYS[name](env, agent, rng) for agent in others}})
        found += [f"{observations[agent]!r} {read(firsts[agent], observations[agent])}" for agent in others]
    return found


def blocks(env: object, agent: str, rng: random.Random) -> str:
    """Cells and blocks of a builder, drawn at random."""
    return "\n".join(
        f"/setblock {rng.randrange(12)} {rng.randrange(5)} 0 {rng.choice([*env.palettes[agent], 'air'])}" for _ in range(4)
    )


def some_words(env: object, agent: str, rng: random.Random) -> str:
    return " ".join(rng.sample(env.text.split(), 4))


PLAYS = {"str_build": blocks, "quote": some_words}
BUILDS = [
    {"strings": ["LI"], "world": world, "reward": reward, "feedback": feedback}
    for world in ("fresh", "persistent")
    for reward in ("dense", "sparse")
    for feedback in ("position", "perfect", "score")
]


@pytest.mark.parametrize("wording", ["plain", "terse"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*(("str_build", build) for build in BUILDS), ("quote", {"reward": "sparse"}), ("quote", {"reward": "dense"})],
)
def test_under_its_own_view_an_agent_reads_nothing_that_depends_on_the_others_answers(name, options, wording) -> None:
    """Whatever one agent writes, the observations and the readings of the others are equal to the byte; with view="all" not."""
    common = {"wording": wording, "turns": 3, "agents": 3, **options}
    rng = seeds.stream(4, "own view")
    env = make(name, **common)
    env.reset(seed=1, options={"task": 0})
    spy = env.agents[0]
    written = [[[PLAYS[name](env, spy, rng), SECRET] for _ in range(3)] for _ in range(4)] + [[[""]] * 3, [[SECRET]] * 3]
    own = [of_the_others(name, texts, view="own", **common) for texts in written]
    assert all(found == own[0] for found in own)
    told = name == "quote" or options["world"] == "persistent" or options["feedback"] != "position"
    assert told == (len({tuple(of_the_others(name, texts, view="all", **common)) for texts in written}) > 1)
