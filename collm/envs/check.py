"""`check_env`: the contract of an environment, as a function that you can run on your own environment."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections.abc import Mapping
from typing import Any

from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test

from collm.envs import gate
from collm.envs.base import TextEnv
from collm.errors import EnvError

SECRET = "zyzzogeton"
Step = tuple[Any, ...]
"""(who acted, what was answered, *what `step` returned)."""


def check_env(env: ParallelEnv, *, episodes: int = 4) -> list[str]:
    """Play a few episodes with arbitrary texts and check the environment's contract.

    Returns the names of the checks passed. Raises EnvError naming the first violation.
    """
    try:
        fresh: ParallelEnv | None = copy.deepcopy(env)  # not played yet; turn trees replay in such copies
    except (TypeError, NotImplementedError):
        fresh = None  # it holds a lock, a process or a socket; only `env` itself is replayed
    gate.agents_of(env)
    gate.num_tasks_of(env)
    passed = []
    for name, check in (
        ("spaces hold texts", _spaces),
        ("PettingZoo's parallel_api_test", _pettingzoo),
        ("texts lie in the spaces", _texts),
        ("one joint reward, a finite number", _joint_reward),
        ("same seed, same episode", _replays),
        ("terminated apart from truncated", _ends),
        ("no answer leaks to another agent", _leaks),
        ("metrics are numbers", _metrics),
    ):
        for seed in range(episodes):
            check(env, fresh, seed)
        passed.append(name)
    return passed


def play(env: ParallelEnv, seed: int, secrets: Mapping[str, str] | None = None) -> tuple[Any, list[Step]]:
    """Play one episode of sampled answers; returns (first observations, steps).

    An agent in `secrets` begins and ends its answers with its secret, where its action space allows that.
    """
    for index, agent in enumerate(env.possible_agents):
        env.action_space(agent).seed(1000 * seed + index)
    observations, _ = gate.reset(env, seed, None)
    steps: list[Step] = []
    while env.agents:
        _require(len(steps) < 1000, "an episode does not end within 1000 turns; end it, or truncate it.")
        actions = {agent: env.action_space(agent).sample() for agent in env.agents}
        for agent in (secrets or {}).keys() & actions.keys():
            secret = (secrets or {})[agent]
            for marked in (f"{secret} {actions[agent]} {secret}", f"{secret} {secret}", secret + secret):
                if env.action_space(agent).contains(marked):
                    actions[agent] = marked
                    break
        steps.append((tuple(env.agents), actions, *gate.step(env, actions)))
    return observations, steps


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EnvError(message)


def _spaces(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    for agent in env.possible_agents:
        for kind, space in (("observation", env.observation_space(agent)), ("action", env.action_space(agent))):
            _require(
                isinstance(space, spaces.Text),
                f"{agent}'s {kind} space is {type(space).__name__}, not text: collm trains text environments "
                "(gymnasium.spaces.Text, or collm.envs.base.TextSpace for any script).",
            )


def _pettingzoo(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    play(env, seed)  # the gate raises a clearer error than PettingZoo's test
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_api_test(env, num_cycles=20)
    except AssertionError as error:
        raise EnvError(f"PettingZoo's parallel_api_test fails: {error}") from error


def _texts(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    first, steps = play(env, seed)
    for observations in [first, *(step[2] for step in steps)]:
        for agent, text in observations.items():
            _require(isinstance(text, str), f"{agent} observed {type(text).__name__}, not text.")
            _require(env.observation_space(agent).contains(text), f"{agent}'s text lies outside its space: {text[:80]!r}")
    for agent, text in first.items():
        _require(bool(text), f"{agent} reads nothing at the first turn.")


def _replays(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    record = play(env, seed)
    _require(record == play(env, seed), f"two episodes with seed {seed} and the same answers differ.")
    _require(
        fresh is None or record == play(copy.deepcopy(fresh), seed),
        f"an episode with seed {seed} and the same answers differs in an environment that has not been played yet.",
    )


def _joint_reward(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    for _, _, _, rewards, *_ in play(env, seed)[1]:
        for agent, reward in rewards.items():
            _require(_is_number(reward), f"{agent}'s reward is {reward!r}, not a finite number.")
        _require(len(set(rewards.values())) == 1, f"agents got different rewards in one turn: {rewards}.")


def _ends(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    for acted, _, _, _, terminations, truncations, _ in play(env, seed)[1]:
        for agent in acted:
            both = bool(terminations[agent]) and bool(truncations[agent])
            _require(not both, f"{agent} ends both or neither terminated and truncated.")
    *_, terminations, truncations, _ = play(env, seed)[1][-1]
    for agent, terminated in terminations.items():
        _require(terminated != truncations[agent], f"{agent} ends both or neither terminated and truncated.")


def _leaks(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    if getattr(env, "has_messages", False):
        return
    for agent in env.possible_agents:
        for _, actions, observations, *_ in play(env, seed, {agent: SECRET})[1]:
            written = actions.get(agent, "").lower()
            for other, text in observations.items():
                leaked = SECRET in written and SECRET in text.lower()
                _require(other == agent or not leaked, f"what {agent} wrote shows in what {other} reads next.")


def _metrics(env: ParallelEnv, fresh: ParallelEnv | None, seed: int) -> None:
    for agent, info in play(env, seed)[1][-1][-1].items():
        for key in ("metrics", "reward_parts"):
            for name, value in info.get(key, {}).items():
                _require(_is_number(value), f"{agent}: {key}[{name!r}] is {value!r}, not a number.")
        count = env.num_parts(env.action_space(agent).sample()) if isinstance(env, TextEnv) else None
        _require(
            count is None or (isinstance(count, int) and count >= 0), f"num_parts returned {count!r}, not a count or None."
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
