"""Scripted players: a whole episode of their answers earns a good reward, whatever the agents wrote before."""

from __future__ import annotations

from typing import Any

import pytest

from collm.envs.catalogue import make

GOOD: dict[str, tuple[dict[str, Any], float]] = {
    "agree": ({"turns": 3}, 3.0),
    "quote": ({}, 0.99),
    "str_build": ({}, 1.95),
    "house_build": ({}, 0.99),
    "bridge_build": ({}, -0.01),
    "resource_gathering": ({}, 15.0),
    "tldr": ({}, 2.7),
    "arxiv": ({}, 2.5),
    "coop_code": ({}, 4.0),
    "class_eval": ({}, 6.0),
}
"""Environment -> options, and the least raw return of a scripted episode."""


def scripted_episode(env: Any, task: int, seed: int = 0) -> tuple[float, float]:
    """(raw return, rejected answers) of an episode of scripted answers."""
    env.reset(seed=seed, options={"task": task})
    total = rejected = 0.0
    while env.agents:
        answers = env.scripted_answers()
        assert answers.keys() == set(env.agents)
        *_, infos = env.step(answers)
        info = next(iter(infos.values()))
        total += info["raw_reward"]
        rejected += info["metrics"]["rejected"] + info["metrics"].get("dropped", 0.0)
    return total, rejected


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", GOOD)
def test_scripted_answers_earn_a_good_reward_and_nothing_is_rejected(name: str, split: str) -> None:
    options, least = GOOD[name]
    env: Any = make(name, split=split, **options)
    for task in range(min(3, env.num_tasks)):
        earned, rejected = scripted_episode(env, task)
        assert earned >= least
        assert rejected == 0
