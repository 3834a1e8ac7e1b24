"""`check_env`: the contract of a world, as a function anyone can run on their own."""

from __future__ import annotations

import contextlib
import io
import warnings
from typing import Any

from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test

from collm.errors import EnvError

SECRET = "zyzzogeton-4711"


def check_env(env: ParallelEnv, *, episodes: int = 4) -> list[str]:
    """Play a few episodes of arbitrary texts and hold the world to its contract.

    Returns the names of the checks passed. Raises EnvError naming the first broken promise.
    """
    passed = []
    for name, check in (
        ("PettingZoo's parallel_api_test", _pettingzoo),
        ("texts lie in the spaces", _spaces),
        ("same seed, same episode", _replays),
        ("one joint reward", _joint_reward),
        ("terminated apart from truncated", _ends),
        ("no answer leaks to another agent", _leaks),
        ("metrics are numbers", _metrics),
    ):
        for seed in range(episodes if check is not _pettingzoo else 1):
            check(env, seed)
        passed.append(name)
    return passed


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise EnvError(message)


def _pettingzoo(env: ParallelEnv, seed: int) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parallel_api_test(env, num_cycles=20)
    except AssertionError as error:
        raise EnvError(f"PettingZoo's parallel_api_test fails: {error}") from error


def play(env: ParallelEnv, seed: int, answers: dict[str, str] | None = None) -> list[Any]:
    """One episode of sampled answers (with `answers` put in front of them): [first observations, step, step, ...]."""
    for index, agent in enumerate(env.possible_agents):
        env.action_space(agent).seed(1000 * seed + index)
    observations, _ = env.reset(seed=seed)
    record: list[Any] = [observations]
    while env.agents:
        _require(len(record) < 1000, "an episode does not end within 1000 turns; end it, or truncate it.")
        actions = {a: (answers or {}).get(a, "") + env.action_space(a).sample() for a in env.agents}
        record.append((tuple(env.agents), *env.step(actions)))
    return record


def _spaces(env: ParallelEnv, seed: int) -> None:
    record = play(env, seed)
    for observations in [record[0], *(step[1] for step in record[1:])]:
        for agent, text in observations.items():
            _require(isinstance(text, str), f"{agent} observed {type(text).__name__}, not text.")
            _require(env.observation_space(agent).contains(text), f"{agent}'s text lies outside its space: {text[:80]!r}")
    for agent, text in record[0].items():
        _require(bool(text), f"{agent} reads nothing at the first turn.")


def _replays(env: ParallelEnv, seed: int) -> None:
    _require(play(env, seed) == play(env, seed), f"two episodes with seed {seed} and the same answers differ.")


def _joint_reward(env: ParallelEnv, seed: int) -> None:
    for _, _, rewards, _, _, _ in play(env, seed)[1:]:
        _require(len(set(rewards.values())) == 1, f"agents got different rewards in one turn: {rewards}.")


def _ends(env: ParallelEnv, seed: int) -> None:
    *_, terminations, truncations, _ = play(env, seed)[-1]
    for agent, terminated in terminations.items():
        _require(terminated != truncations[agent], f"{agent} ends both or neither terminated and truncated.")


def _leaks(env: ParallelEnv, seed: int) -> None:
    if getattr(env, "has_messages", False):
        return
    for agent in env.possible_agents:
        for _, observations, *_ in play(env, seed, {agent: SECRET})[1:]:
            for other, text in observations.items():
                _require(other == agent or SECRET not in text, f"what {agent} wrote shows in what {other} reads next.")


def _metrics(env: ParallelEnv, seed: int) -> None:
    infos = play(env, seed)[-1][-1]
    for agent, info in infos.items():
        for key in ("metrics", "reward_parts"):
            for name, value in info.get(key, {}).items():
                _require(isinstance(value, (int, float)), f"{agent}: {key}[{name!r}] is {value!r}, not a number.")
