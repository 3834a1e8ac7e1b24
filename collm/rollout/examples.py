"""Scripted players of environments: worked examples, and whole episodes to imitate."""

from __future__ import annotations

from typing import Any

from collm import seeds
from collm.envs import gate
from collm.envs.base import EnvMaker
from collm.errors import ConfigError
from collm.rollout.live import begin, live_episode, resume
from collm.rollout.plan import Plan
from collm.types import Completion, Episode, Example, Message, encodable


def scripted_answers(env: Any, way_out: str) -> dict[str, str]:
    """The scripted player's answer of every live agent. Raises ConfigError with `way_out` where one is missing."""
    player = getattr(env, "scripted_answers", None)
    answers = player() if callable(player) else {}
    missing = [agent for agent in env.agents if agent not in answers]
    if missing:
        raise ConfigError(f"{type(env).__name__} has no scripted player for {', '.join(missing)}. {way_out}")
    return {agent: encodable(str(answers[agent])) for agent in env.agents}


def draw_examples(maker: EnvMaker, count: int, seed: int) -> tuple[Example, ...]:
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
        for agent, answer in scripted_answers(env, way_out).items():
            examples.append(Example((Message("user", observations[agent]), Message("assistant", answer)), agent, task))
    return tuple(examples)


def play_scripted(plan: Plan, task: int, seed: int) -> Episode:
    """An episode of the scripted player. Its answers have no token ids. Raises ConfigError without such a player."""
    env = plan.env.make(plan.split)
    live = live_episode(plan, task, seed, env=env)
    begin(live)
    while live.requests:
        answers = scripted_answers(env, "Give chats to imitate: --data FILE (JSON lines).")
        resume(live, [Completion(request.agent, answers[request.agent]) for request in live.requests])
    return live.episode
