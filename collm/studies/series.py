"""Curves over a run: held-out reward, and the variance that its critics explain before each turn."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from collm.runs.open import Run
from collm.runs.read import Record, played, read_episodes
from collm.studies.intervals import Interval, by_task, interval

REWARD = "reward"
"""Name of the raw reward of the last turn played; other measures are environment metrics."""
_EXPLAINED = {
    what: re.compile(rf"(?:.*/)?{name}_turn_(\d+)")
    for what, name in (
        ("within", "explained_within_tasks"),
        ("all", "explained_variance"),
        ("ceiling", "ceiling"),
        ("spread", "spread"),
        ("variation", "variation"),
    )
}
Curves = dict[int, tuple[NDArray[np.float64], NDArray[np.float64]]]
"""Turn -> (joint actions, fraction of variance at each)."""


def scores(episodes: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Measure -> distinct task -> value; "reward" first. A metric that an episode lacks is NaN."""
    tasks = [episode["label"] or str(episode["task"]) for episode in episodes]
    columns = {REWARD: [episode["score"] for episode in episodes]}
    for name in dict.fromkeys(name for episode in episodes for name in episode["metrics"]):
        columns[name] = [episode["metrics"].get(name) for episode in episodes]
    return {
        name: by_task(tasks, [math.nan if value is None else float(value) for value in column])
        for name, column in columns.items()
    }


def repeats_tasks(run: Run) -> bool:
    """Whether tasks repeat within an iteration, so that returns vary within tasks: by design (group_size above 1), or in at
    least half of the iterations."""
    within = _by_turn(run, "within")
    often = bool(within) and bool(np.isfinite(within[min(within)][1]).mean() >= 0.5)
    return often or run.config["algorithm"].get("group_size", 1) > 1


def explained_by_turn(run: Run) -> Curves:
    """The fraction of the return's variance within tasks that the critic explains, averaged over several critics.

    If tasks do not repeat within an iteration, it is the fraction of the whole variance, differences between tasks included. It
    is NaN, a gap in the curve, where the variance is 0.
    """
    found = _by_turn(run, "within" if repeats_tasks(run) else "all")
    return {turn: curve for turn, curve in found.items() if np.isfinite(curve[1]).any()}


def ceiling_by_turn(run: Run) -> Curves:
    """Turn -> metric ceiling: the share of the variance within tasks that least squares on the environment metrics explains;
    empty where tasks do not repeat."""
    found = _by_turn(run, "ceiling") if repeats_tasks(run) else {}
    return {turn: curve for turn, curve in found.items() if np.isfinite(curve[1]).any()}


def spread_by_turn(run: Run) -> Curves:
    """The variation that `explained_by_turn` gives a fraction of: the sum of squared deviations of returns from their task's
    mean, or from the mean of all where tasks do not repeat; empty for runs of versions that did not record it."""
    return _by_turn(run, "spread" if repeats_tasks(run) else "variation")


def _by_turn(run: Run, what: str) -> Curves:
    points: dict[int, dict[int, list[float]]] = {}
    for record in run.metrics:
        for name, value in record.items():
            if found := _EXPLAINED[what].fullmatch(name):
                at = points.setdefault(int(found[1]), {}).setdefault(record["joint_actions"], [])
                at.append(math.nan if value is None else float(value))
    return {
        turn: (np.array(list(by_x), dtype=np.float64), np.array([np.mean(values) for values in by_x.values()]))
        for turn, by_x in sorted(points.items())
    }


def held_out_curve(run: Run) -> tuple[list[int], list[Interval]]:
    """(joint actions done at each held-out evaluation, reward of each evaluation over distinct tasks).

    An evaluation without an episode that was played to its end is left out. Raises RunError where a file is damaged.
    """
    done = {record["iteration"]: record["joint_actions"] for record in run.metrics}
    evaluations = {i: played(read_episodes(path)) for i, path in run.evaluations().items() if i in done}
    rewards = {i: interval(list(scores(found)[REWARD].values())) for i, found in evaluations.items() if found}
    return [done[i] for i in rewards], list(rewards.values())
