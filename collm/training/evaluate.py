"""Held-out evaluation: the whole split, greedy by default, through the same `collect` as training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from collm import seeds
from collm.config import Config
from collm.engines.base import Engine
from collm.envs import gate
from collm.envs.catalogue import EnvSpec
from collm.rollout.collect import Plan, collect
from collm.types import Episode, Sampling

RESERVED = frozenset(("reward", "episodes", "failed"))
"""Names of our own under `evaluation/`: a metric of such a name is `metrics/NAME` there."""


@dataclass(slots=True)
class Evaluation:
    """Episodes of distinct held-out tasks, each once, and the seconds it took to play them."""

    episodes: list[Episode]
    seconds: float

    @property
    def played(self) -> list[Episode]:
        return [episode for episode in self.episodes if not episode.failure]

    def columns(self) -> dict[str, np.ndarray]:
        """ "reward" (raw, of the last turn played) and the task's metrics: name -> one number per played episode."""
        names = dict.fromkeys(name for episode in self.played for name in episode.metrics)
        columns = {"reward": np.array([episode.score for episode in self.played], dtype=np.float64)}
        for name in names:
            column = f"metrics/{name}" if name in RESERVED else name
            columns[column] = np.array([e.metrics.get(name, np.nan) for e in self.played], dtype=np.float64)
        return columns

    def summary(self) -> dict[str, Any]:
        """Means, as one iteration's line of metrics keeps them."""
        record: dict[str, Any] = {f"evaluation/{name}": float(column.mean()) for name, column in self.columns().items()}
        record["evaluation/episodes"] = len(self.played)
        record["evaluation/failed"] = len(self.episodes) - len(self.played)
        record["seconds/evaluation"] = self.seconds
        return record

    @property
    def tokens(self) -> int:
        return sum(episode.num_tokens() for episode in self.episodes)


def alarms(summary: Mapping[str, Any]) -> dict[str, str]:
    """Warnings about what degenerate answers look like, by the metric that shows it; a task without the metric has none."""
    found = {}
    for name, below, limit, meaning in ALARMS:
        mean = summary.get(f"evaluation/{name}")
        if isinstance(mean, float) and (mean < limit if below else mean > limit):
            found[name] = (
                f"warning: held-out {name} is {mean:.2f}, {'below' if below else 'above'} {limit}: {meaning}, "
                "whatever the reward is. Read some answers (collm report)."
            )
    return found


ALARMS = (
    ("repetition", False, 0.5, "answers repeat themselves"),
    ("source_overlap", False, 0.9, "answers copy their source"),
    ("source_words", True, 0.1, "answers have nothing to do with their source"),
)
"""(metric, whether low values are the bad ones, limit, what it means)."""


def plan_of(config: Config, split: str) -> Plan:
    """How the episodes of a split are played under a config."""
    rollout, evaluation = config.rollout, config.evaluation
    training = split == "train"
    return Plan(
        EnvSpec(config.env.name, config.env.options),
        split=split,
        protocol=rollout.protocol,
        history=rollout.history,
        max_turns=rollout.max_turns,
        sampling=Sampling(
            temperature=rollout.temperature if training else evaluation.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_tokens=rollout.max_tokens,
        ),
        branches=config.algorithm.group_size if training and config.algorithm.tree else 0,
    )


def num_tasks(plan: Plan) -> int:
    """How many tasks a split has; a world that does not say so has one."""
    return gate.num_tasks_of(plan.env.make(plan.split))


def evaluate(
    config: Config,
    engine: Engine,
    *,
    episodes: int | None = None,
    split: str = "eval",
    stop: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Play each held-out task once, the first `episodes` of them if given. split: other tasks, played in the same manner."""
    plan = replace(plan_of(config, "eval"), split=split)
    wanted = config.evaluation.episodes if episodes is None else episodes
    total = num_tasks(plan)
    tasks = range(total if wanted is None else min(total, wanted))
    started = time.monotonic()
    groups = collect(plan, engine, tasks, [seeds.derive(config.run.seed, "evaluation", t) for t in tasks], stop=stop)
    return Evaluation([episode for group in groups for episode in group.episodes], time.monotonic() - started)
