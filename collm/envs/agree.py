"""`agree`: the smallest cooperative environment, for trying an algorithm in seconds."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.wording import Texts, Wording, texts_of
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
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" and "eval" hold the same tasks.
    """

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        colours: int | Sequence[str] = 4,
        turns: int = 1,
        wording: Wording = "plain",
        split: str = "train",
    ):
        super().__init__(agent_names(agents, "agent"), turns)
        self.wording = texts_of(wording, PLAIN, TERSE)
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
        self.planned = self.target or rng.choice(self.colours)
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        named = [self.named(answer) for answer in answers.values()]
        match = float(named[0] is not None and len(set(named)) == 1 and self.target in ("", named[0]))
        metrics = {"match": match, "rejected": float(named.count(None))}
        observations = {agent: self.wording.later(self, agent, match) for agent in self.agents}
        return Outcome(match, {"match": match}, observations, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """The same colour for all agents: the target, or one drawn at the beginning of the episode."""
        return dict.fromkeys(self.agents, self.planned)

    def named(self, answer: str) -> str | None:
        """The first colour in the answer, or None."""
        found = self._pattern.search(answer.lower())
        return found.group(1) if found else None

    def state(self) -> str:
        return f"turn {self.turn} of {self.turns} {self.target}".strip()

    def num_parts(self, answer: str) -> int:
        return 1

    def task_name(self, task: int) -> str:
        return self.colours[task] if self.alone else "agree"


def _plain_first(env: Agree, agent: str) -> str:
    """The example has colours of its own, so that a copy of it does not make agents agree."""
    rule = f"The colour {env.target} scores." if env.alone else "All agents score if they name the same colour."
    return (
        f"You are {agent} of {len(env.agents)}. {rule}\nOf the colours orange and purple, an answer is: purple\n\n"
        f"Name one of these colours: {_either(env)}."
    )


def _plain_later(env: Agree, agent: str, match: float) -> str:
    return f"{'You scored.' if match else 'You did not score.'}\nName one of these colours: {_either(env)}."


def _either(env: Agree) -> str:
    return f"{', '.join(env.colours[:-1])} or {env.colours[-1]}"


def _terse_first(env: Agree, agent: str) -> str:
    rule = f"Name the colour {env.target}." if env.alone else "All name one colour at once; the same colour scores."
    return f"You are {agent} of {len(env.agents)}. {rule}\nColours: {' '.join(env.colours)}"


def _terse_later(env: Agree, agent: str, match: float) -> str:
    return "That scored. Again." if match else "That did not score. Again."


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
