"""Small worlds that tests need."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.errors import EnvError


@contextmanager
def cpu_seconds_at_most(limit: float) -> Iterator[None]:
    """Fails where the block needs more CPU time of this process, which depends on other work far less than time does."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < limit


class Echo(TextEnv):
    """Every agent reads the same words at every turn; the reward is the share of answers that hold an "e"."""

    def __init__(self, agents: int = 2, turns: int = 2):
        super().__init__(agent_names(agents, "agent"), turns)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        return {agent: "Name one colour." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        reward = sum("e" in answer for answer in answers.values()) / len(answers)
        return Outcome(reward, {"e": reward}, {agent: "Again." for agent in self.agents}, metrics={"e": reward})


class Waiting(TextEnv):
    """Two agents whose world takes its time, as one with a sandbox or a server does; every tenth task breaks.

    The answers decide the reward and the next text; `pause` is how long a reset or a turn takes, in seconds.
    """

    waits = True
    num_tasks = 100

    def __init__(self, pause: float = 0.05, turns: int = 2):
        super().__init__(agent_names(2, "agent"), turns)
        self.pause = pause

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        time.sleep(self.pause)
        self.number = rng.randrange(1000)
        return {agent: f"{agent}, task {task}, number {self.number}" for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        time.sleep(self.pause)
        if self.task % 10 == 9 and self.turn == 1:
            raise EnvError("the world is gone")
        reward = float(sum(map(len, answers.values())))
        return Outcome(reward, {"length": reward}, {agent: f"{self.number} {reward}" for agent in answers})


class Computing(Waiting):
    """The same world, stepped one after the other."""

    waits = False


class Meeting(Waiting):
    """No turn ends before four worlds play at the same time; alone it would break after ten seconds."""

    met = threading.Barrier(4, timeout=10)

    def play(self, answers: dict[str, str]) -> Outcome:
        self.met.wait()
        return super().play(answers)


class Buggy(Waiting):
    """Task 2 and those above have a bug."""

    def play(self, answers: dict[str, str]) -> Outcome:
        if self.task >= 2:
            raise ZeroDivisionError(f"a bug in task {self.task}")
        return super().play(answers)


class Uneven(Waiting):
    """Task n has n + 1 turns. When the second turn of task 3 has been played, the process `doomed` is killed."""

    waits = False
    num_tasks = 4

    def __init__(self, doomed: int = 0, agents: int = 3, split: str = "train"):
        TextEnv.__init__(self, agent_names(agents, "builder"), self.num_tasks)
        self.doomed = doomed

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.turns = task + 1
        return {agent: f"{agent}, task {task}" for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        if self.doomed and self.task == 3 and self.turn == 1:
            os.kill(self.doomed, signal.SIGKILL)
            time.sleep(0.3)
        return Outcome(1.0, {"one": 1.0}, {agent: "Again." for agent in answers})


class Luck(TextEnv):
    """What is paid after the second turn is known as a number after the first, and shown to nobody as text."""

    num_tasks = 4

    def __init__(self, agents: int = 2) -> None:
        super().__init__(agent_names(agents, "agent"), 2)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.luck = rng.random()
        return {agent: "Name one colour." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        reward = 3 * self.luck + 0.5 * self.task if self.last_turn else 0.0
        return Outcome(reward, {"luck": reward}, {agent: "Again." for agent in self.agents}, metrics={"luck": self.luck})


COLOURS = ("red", "green", "blue", "yellow", "white", "black")


class Roles(TextEnv):
    """The first agent is to name the task's colour, the second the colour after it; a scripted player does.

    Reward: the share of agents that answered exactly that. The first observation has the number of its seed.
    """

    def __init__(self, agents: int = 2, turns: int = 2, tasks: int = 6, split: str = "train"):
        super().__init__(agent_names(agents, "agent"), turns)
        self.num_tasks, self.split = tasks, split

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.number = rng.randrange(1000)
        return {agent: f"{self.split} {task}, {self.number}: {agent}, name a colour." for agent in self.agents}

    def scripted_answers(self) -> dict[str, str]:
        return {agent: COLOURS[(self.task + i) % len(COLOURS)] for i, agent in enumerate(self.agents)}

    def play(self, answers: dict[str, str]) -> Outcome:
        wanted = self.scripted_answers()
        reward = sum(answers[agent] == wanted[agent] for agent in answers) / len(answers)
        return Outcome(
            reward, {"right": reward}, {agent: f"Again, {agent}." for agent in self.agents}, metrics={"right": reward}
        )
