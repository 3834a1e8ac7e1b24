"""Times steps of a recipe on this machine, for the hours of the whole run. Nothing is written."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from collm import seeds
from collm.settings.rooms import Config
from collm.training.assemble import Assembly, assemble, prepare
from collm.training.task import draw_tasks, num_tasks

PATIENCE = 60.0
"""Seconds that one timed step may take; a recipe whose steps are longer is timed with fewer tasks."""
SMALL = 8
"""The untimed first step, and timed steps of fewer tasks, have this fraction of the recipe's tasks."""


@dataclass(frozen=True, slots=True)
class Step:
    """Seconds of collecting and of learning, and the number of episodes."""

    collect: float
    learn: float
    episodes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Two timed steps of a recipe.

    Example: Measured((Step(2.0, 4.0, 8), Step(2.0, 4.0, 8)), 1, 4, iterations=100, evaluations=0, held_out=0).iteration == 24.0
    """

    steps: tuple[Step, Step]
    played: int
    """Tasks of each timed step."""
    tasks: int
    """Tasks of the recipe's iterations."""
    iterations: int
    evaluations: int
    """Held-out evaluations of the whole run."""
    held_out: int
    """Episodes of one evaluation."""

    @property
    def iteration(self) -> float:
        """Seconds of one iteration: the mean of both steps, in proportion to the tasks."""
        return sum(step.collect + step.learn for step in self.steps) / 2 * self.tasks / self.played

    @property
    def evaluation(self) -> float:
        """Seconds of one evaluation; an episode is assumed to take as long as in training."""
        return self.held_out * sum(step.collect for step in self.steps) / sum(step.episodes for step in self.steps)

    @property
    def hours(self) -> float:
        return (self.iterations * self.iteration + self.evaluations * self.evaluation) / 3600

    @property
    def error(self) -> float:
        """The difference between both steps, relative to their mean."""
        one, other = (step.collect + step.learn for step in self.steps)
        return 2 * abs(one - other) / (one + other)

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "hours": self.hours,
            "seconds_per_iteration": self.iteration,
            "seconds_per_evaluation": self.evaluation,
            "relative_error": self.error,
            "tasks_played": self.played,
            "tasks": self.tasks,
        }

    def sentences(self) -> str:
        """The numbers in words."""
        scaled = "the recipe's own size" if self.played == self.tasks else f"scaled from {self.played} of {self.tasks} tasks"
        hours = f"{self.hours:.1f} hours" if self.hours >= 1 else f"{60 * self.hours:.1f} minutes"
        return (
            f"Measured here: {hours} for {self.iterations} iterations of {self.iteration:.1f} s ({scaled}) and "
            f"{self.evaluations} evaluations of about {self.evaluation:.1f} s.\nTwo timed steps differ by {self.error:.0%}. "
            "Loading and saving are not counted, and answers that grow or shrink in training change the time in proportion."
        )


def measure(config: Config) -> Measured:
    """Load the team and time two steps after an untimed smaller one. Raises ConfigError as a run would."""
    config = prepare(config.in_one_process())
    made = assemble(config)
    tasks = config.rollout.tasks
    small = max(1, tasks // SMALL)
    first = _step(made, config, 0, small)
    played = tasks if (first.collect + first.learn) * tasks / small <= PATIENCE else small
    steps = _step(made, config, 1, played), _step(made, config, 2, played)
    made.engine.close()
    total = config.run.iterations
    held_out = num_tasks(replace(made.plan, split="eval")) if config.evaluation.every else 0
    return Measured(
        steps,
        played,
        tasks,
        iterations=total,
        evaluations=sum(config.evaluation.due(k, total) for k in range(total + 1)),
        held_out=config.evaluation.episodes or held_out,
    )


def _step(made: Assembly, config: Config, number: int, tasks: int) -> Step:
    """One step after the critic's warm-up, on tasks that depend on `number`."""
    chosen = draw_tasks(config.run.seed, number, tasks, made.tasks)
    keys = [seeds.derive(config.run.seed, "measure", number, i) for i in range(tasks)]
    began = time.monotonic()
    groups = made.collector.play(made.plan, chosen, keys, number)
    made.engine.rest()
    collected = time.monotonic()
    made.learner.update(groups, min(config.critic.warmup, config.run.iterations - 1))
    made.engine.load(made.team)
    return Step(collected - began, time.monotonic() - collected, sum(len(group.episodes) for group in groups))
