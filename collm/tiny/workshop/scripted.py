"""Episodes of scripted players: the texts that each agent read and wrote."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

from collm.envs.base import TextEnv

Chat = list[tuple[str, str]]
"""(observation, answer) of each turn of one agent."""

World = TypeVar("World", bound=TextEnv)


def play(env: World, player: Callable[[World, str, random.Random], str], rng: random.Random) -> list[Chat]:
    """Play one episode with the same player for every agent; returns the agents' chats in random order.

    The last turn is not stepped, since its outcome would not be read.
    """
    observations, _ = env.reset(seed=rng.getrandbits(32))
    chats: dict[str, Chat] = {agent: [] for agent in env.agents}
    while env.agents:
        answers: dict[str, Any] = {agent: player(env, agent, rng) for agent in env.agents}
        for agent, answer in answers.items():
            chats[agent].append((observations[agent], answer))
        if env.last_turn:
            break
        observations, *_ = env.step(answers)
    played = list(chats.values())
    rng.shuffle(played)
    return played
