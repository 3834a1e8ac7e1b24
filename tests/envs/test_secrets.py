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
from collm.envs.catalogue import ENVIRONMENTS, find

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
