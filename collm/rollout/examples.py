"""Worked examples from an environment's scripted player."""

from __future__ import annotations

from typing import Any

from collm import seeds
from collm.envs import gate
from collm.envs.base import EnvMaker
from collm.errors import ConfigError
from collm.types import Example, Message, encodable


def scripted_answers(env: Any, name: str, way_out: str) -> dict[str, str]:
    """The scripted player's answer of every live agent. Raises ConfigError with `way_out` where one is missing.

    name: the environment's name, for the error.
    """
    player = getattr(env, "scripted_answers", None)
    answers = player() if callable(player) else {}
    missing = [agent for agent in env.agents if agent not in answers]
    if missing:
        raise ConfigError(f"the environment {name!r} has no scripted player for {', '.join(missing)}. {way_out}")
    return {agent: encodable(str(answers[agent])) for agent in env.agents}


def draw_examples(maker: EnvMaker, count: int, seed: int, *, name: str) -> tuple[Example, ...]:
    """The first turns of `count` training tasks, answered by the environment's scripted player: one example per task and agent.

    The tasks differ; an environment with fewer than `count` tasks repeats them with other seeds. Raises ConfigError for an
    environment without a scripted player.
    """
    env = maker.make("train")
    order = list(range(gate.num_tasks_of(env)))
    seeds.stream(seed, "examples").shuffle(order)
    way_out = "Set rollout.examples to a file of chats (JSON lines), or to 0."
    examples: list[Example] = []
    for number in range(count):
        task = order[number % len(order)]
        observations, _ = gate.reset(env, seeds.derive(seed, "example", number), task)
        for agent, answer in scripted_answers(env, name, way_out).items():
            examples.append(Example((Message("user", observations[agent]), Message("assistant", answer)), agent, task))
    return tuple(examples)
