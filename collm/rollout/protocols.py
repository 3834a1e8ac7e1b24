"""Protocols: who speaks when, seeing what. A protocol is a generator that yields requests and receives completions.

It knows neither engine nor batch; `collect` advances any number of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from pettingzoo import ParallelEnv

from collm.errors import ConfigError, EnvError
from collm.types import Completion, Episode, History, Request

Play = Generator[list[Request], list[Completion], Episode]
Protocol = Callable[..., Play]


def parallel(env: ParallelEnv, episode: Episode, *, history: History = "full", max_turns: int | None = None) -> Play:
    """All agents act at once, each on its own history: decentralized execution.

    `episode` comes with its task and seed and is filled turn by turn. A completion that failed, or a world that breaks its
    contract, ends the episode as failed with the reason kept. After `max_turns` the collector cuts it: truncated.
    """
    try:
        observations, infos = env.reset(seed=episode.seed, options={"task": episode.task})
    except EnvError as error:
        episode.failure = f"reset: {error}"
        return episode
    episode.observations = dict(observations)
    episode.state = _state(env)
    names = [info["task_name"] for info in infos.values() if "task_name" in info]
    episode.label = str(names[0] if names else episode.task)
    while env.agents:
        if max_turns is not None and len(episode.turns) == max_turns:
            episode.truncated = True
            return episode
        completions = yield [Request(agent, episode.history(agent, history)) for agent in env.agents]
        failed = next((c for c in completions if c.finish_reason == "error"), None)
        if failed is not None:
            episode.failure = f"{failed.agent}, turn {len(episode.turns)}: {failed.error}"
            return episode
        try:
            observations, rewards, terminations, truncations, infos = env.step({c.agent: c.text for c in completions})
        except EnvError as error:
            episode.failure = f"step {len(episode.turns)}: {error}"
            return episode
        episode.add(completions, observations, rewards, terminations, truncations, infos, _state(env))
    return episode


def single(env: ParallelEnv, episode: Episode, *, history: History = "full", max_turns: int | None = None) -> Play:
    """One agent alone: the single-agent rows of a table. Refuses a world with more."""
    if len(env.possible_agents) != 1:
        raise ConfigError(
            f"rollout.protocol='single' plays one agent, but the task has {len(env.possible_agents)}: "
            f"{', '.join(env.possible_agents)}. Set env.agents=1, or rollout.protocol='parallel'."
        )
    return parallel(env, episode, history=history, max_turns=max_turns)


PROTOCOLS: dict[str, Protocol] = {"parallel": parallel, "single": single}


def _state(env: Any) -> str:
    """The privileged view as text; a world without one has none."""
    try:
        state = env.state()
    except (AttributeError, NotImplementedError):
        return ""
    return state if isinstance(state, str) else str(state)
