"""Small worlds that tests need."""

from __future__ import annotations

import random

from collm.envs.base import Outcome, TextEnv, agent_names


class Echo(TextEnv):
    """Every agent reads the same words at every turn; the reward is the share of answers that hold an "e"."""

    def __init__(self, agents: int = 2, turns: int = 2):
        super().__init__(agent_names(agents, "agent"), turns)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return {agent: "Name one colour." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        reward = sum("e" in answer for answer in answers.values()) / len(answers)
        return Outcome(reward, {"e": reward}, {agent: "Again." for agent in self.agents}, metrics={"e": reward})
