"""`agree`: the smallest cooperative environment, for trying an algorithm in seconds."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.errors import EnvError

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "pink")


class Agree(TextEnv):
    """Agents each name a colour without seeing the others' choice.

    Team reward per turn: 1 if all colours are the same, else 0. Ends after `turns` turns.
    Uniform play by n agents over k colours returns turns / k**(n-1); perfect play returns turns.
    A single agent reads a target colour, a different one in each task, and earns 1 for naming it: uniform play returns
    turns / k.
    Metrics: match (1 if the turn was rewarded), rejected (answers without a colour).

    Args:
        agents: how many agents, or their names.
        colours: how many of the eight colours, or a list of names.
        turns: how many turns an episode has.
        split: "train" and "eval" hold the same tasks.
    """

    def __init__(self, agents: int | Sequence[str] = 2, colours: int | Sequence[str] = 4, turns: int = 1, split: str = "train"):
        super().__init__(agent_names(agents, "agent"), turns)
        counted = isinstance(colours, int)
        self.colours = list(COLOURS[: max(0, colours)]) if isinstance(colours, int) else [str(c).lower() for c in colours]
        too_many = counted and len(self.colours) != colours
        if len(self.colours) < 2 or len(set(self.colours)) < len(self.colours) or too_many:
            raise EnvError(f"colours={colours!r} must give at least two different colours: a number from 2 to 8, or a list.")
        self.alone = len(self.possible_agents) == 1
        self.num_tasks = len(self.colours) if self.alone else 1
        self._pattern = re.compile(r"\b(" + "|".join(map(re.escape, sorted(self.colours, key=len, reverse=True))) + r")\b")

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.target = self.colours[task] if self.alone else ""
        rule = f"Name the colour {self.target}." if self.alone else "All name one colour at once; the same colour scores."
        listed = " ".join(self.colours)
        return {agent: f"You are {agent} of {len(self.agents)}. {rule}\nColours: {listed}" for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        named = [self.named(answer) for answer in answers.values()]
        match = float(named[0] is not None and len(set(named)) == 1 and self.target in ("", named[0]))
        text = "That scored. Again." if match else "That did not score. Again."
        metrics = {"match": match, "rejected": float(named.count(None))}
        return Outcome(match, {"match": match}, {agent: text for agent in self.agents}, metrics=metrics)

    def named(self, answer: str) -> str | None:
        """The first colour in the answer, or None."""
        found = self._pattern.search(answer.lower())
        return found.group(1) if found else None

    def state(self) -> str:
        return f"turn {self.turn} of {self.turns} {self.target}".strip()

    def task_name(self, task: int) -> str:
        return self.colours[task] if self.alone else "agree"
