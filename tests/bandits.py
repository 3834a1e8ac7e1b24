"""A bandit whose counterfactual truth is known: its reward is a weighted sum of the agents' digits."""

from __future__ import annotations

import random

from collm.engines.scripted import ScriptedEngine
from collm.envs.base import Outcome, TextEnv
from collm.envs.catalogue import EnvSpec
from collm.errors import EnvError
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.types import Episode

WEIGHTS = {"small": 1.0, "large": 4.0}


class Additive(TextEnv):
    """Two agents each draw a digit at every turn; the reward is 1 times the one plus 4 times the other."""

    def __init__(self, turns: int = 1, hidden: bool = False):
        super().__init__(list(WEIGHTS), turns)
        self.hidden = hidden

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return dict.fromkeys(self.agents, "Draw a digit.")

    def play(self, answers: dict[str, str]) -> Outcome:
        if "ten" in answers.values():
            raise EnvError("not a digit")
        reward = sum(WEIGHTS[agent] * int(answer) for agent, answer in answers.items())
        seen = str(random.SystemRandom().random()) if self.hidden else "Again."
        return Outcome(reward, {}, dict.fromkeys(answers, seen))


def uniform() -> ScriptedEngine:
    return ScriptedEngine(lambda request: str(random.Random(request.seed).randrange(10)))


def played(turns: int, num: int, **options) -> tuple[Plan, list[Episode]]:
    plan = Plan(EnvSpec("bandits:Additive", {"turns": turns, **options}))
    return plan, [group.episodes[0] for group in collect(plan, uniform(), [0] * num, range(num))]
