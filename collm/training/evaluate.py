"""Held-out evaluation: the whole split, greedy by default, through the same `collect` as training."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from collm import seeds
from collm.rollout.collector import Collector
from collm.settings.rooms import Config
from collm.training.task import num_tasks, plan_of
from collm.types import Episode, Example

RESERVED = frozenset(("reward", "episodes", "failed"))
"""Names under `evaluation/` that this package uses; an environment metric of such a name becomes `evaluation/metrics/NAME`."""


@dataclass(slots=True)
class Evaluation:
    """The result of one held-out evaluation."""

    episodes: list[Episode]
    """In the order of tasks, failed ones included; a task may be played several times."""
    seconds: float
    """Wall-clock time."""

    @property
    def played(self) -> list[Episode]:
        return [episode for episode in self.episodes if not episode.failure]

    def columns(self) -> dict[str, np.ndarray]:
        """Name -> one number per completed episode: "reward" (raw, of the last turn played) and the environment metrics."""
        names = dict.fromkeys(name for episode in self.played for name in episode.metrics)
        columns = {"reward": np.array([episode.score for episode in self.played], dtype=np.float64)}
        for name in names:
            column = f"metrics/{name}" if name in RESERVED else name
            columns[column] = np.array([e.metrics.get(name, np.nan) for e in self.played], dtype=np.float64)
        return columns

    def summary(self) -> dict[str, Any]:
        """Means over completed episodes, for the iteration's record in metrics.jsonl."""
        record: dict[str, Any] = {f"evaluation/{name}": float(column.mean()) for name, column in self.columns().items()}
        record["evaluation/episodes"] = len(self.played)
        record["evaluation/failed"] = len(self.episodes) - len(self.played)
        record["seconds/evaluation"] = self.seconds
        return record

    @property
    def tokens(self) -> int:
        return sum(episode.num_tokens() for episode in self.episodes)


def evaluate(
    config: Config,
    collector: Collector,
    *,
    episodes: int | None = None,
    split: str = "eval",
    examples: tuple[Example, ...] | None = None,
) -> Evaluation:
    """Play each held-out task once; or `episodes` of them from the first on, and again from the first after the last.

    split: the environment's split of tasks. examples: used instead of those of the config.
    """
    plan = replace(plan_of(config, "eval", examples=examples), split=split)
    wanted = config.evaluation.episodes if episodes is None else episodes
    total = num_tasks(plan)
    number = range(total if wanted is None else wanted)
    started = time.monotonic()
    keys = [seeds.derive(config.run.seed, "evaluation", i) for i in number]
    groups = collector.play(plan, [i % total for i in number], keys, 0)
    return Evaluation([episode for group in groups for episode in group.episodes], time.monotonic() - started)
