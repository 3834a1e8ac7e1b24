"""Confidence intervals of means: the bootstrap over distinct tasks, and Student's t."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

RESAMPLES = 10_000
FEWEST = 8
"""Smallest number of distinct tasks for an interval. Resampling fewer tasks does not represent unseen tasks."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over distinct tasks with its 95 % interval, in the units of the values.

    `low` and `high` are None without an interval; `note` then holds the reason.
    Example: Interval(mean=0.41, low=0.35, high=0.47, num_tasks=115)
    """

    mean: float
    low: float | None
    high: float | None
    num_tasks: int
    note: str = ""

    def apart(self, other: Interval) -> bool:
        """Whether both intervals exist and do not overlap."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return False
        return self.high < other.low or other.high < self.low

    def plain(self) -> dict[str, float | None]:
        """Plain values for JSON; a mean that is not finite becomes null."""
        return {"mean": self.mean if math.isfinite(self.mean) else None, "low": self.low, "high": self.high}


def interval(values_K: Sequence[float], *, seed: int = 0, fewest: int = FEWEST, unit: str = "task") -> Interval:
    """The mean of K tasks, and the percentiles 2.5 and 97.5 of 10,000 means of K tasks drawn with replacement.

    The same seed and K draw the same tasks, so the columns of a table are resampled together. If a value is not finite, the
    mean is NaN without an interval, and the note counts such tasks.

    Args:
        values_K: (K,) one value per distinct task, K >= 1.
        fewest: smallest number of values for an interval. unit: the unit that a value belongs to, "task" or "seed".
    Raises: ValueError for an empty sequence.
    Source: Efron 1979, the bootstrap; percentile method.
    """
    values = np.asarray(values_K, dtype=np.float64)
    num = len(values)
    if num == 0:
        raise ValueError(f"no {unit} is given to average over")
    lost = int(np.count_nonzero(~np.isfinite(values)))
    if lost:
        return Interval(math.nan, None, None, num, f"not a finite number for {lost} of {num} {unit}s")
    mean = float(values.mean())
    if num < fewest:
        units = unit if num == 1 else f"{unit}s"
        note = f"no interval: {num} distinct {units}, and a bootstrap over {unit}s needs at least {fewest}"
        return Interval(mean, None, None, num, note)
    rng = np.random.default_rng(seed)
    blocks = [values[rng.integers(num, size=(RESAMPLES // 10, num))].mean(axis=1) for _ in range(10)]
    low, high = np.percentile(np.concatenate(blocks), [2.5, 97.5])
    return Interval(mean, float(low), float(high), num)


def student(values_K: Sequence[float], *, fewest: int = FEWEST, unit: str = "task") -> Interval:
    """The mean of K values with Student's 95 % interval, mean +- t(K - 1) s / sqrt(K); otherwise as `interval`.

    For three or five normal values, the bootstrap's interval covers the true mean in 75 or 84 % of cases, this one in 95 %.
    """
    found = interval(values_K, fewest=max(fewest, 2), unit=unit)
    if found.low is None:
        return found
    half = _quantile(found.num_tasks - 1) * float(np.std(values_K, ddof=1)) / math.sqrt(found.num_tasks)
    return Interval(found.mean, found.mean - half, found.mean + half, found.num_tasks)


def student_p(values_K: Sequence[float]) -> float:
    """The two-sided p-value of Student's test that the mean of K values is 0; NaN below two values or if one is not finite.

    Values that are all equal give 0, or 1 if they are all 0.
    """
    values = np.asarray(values_K, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return math.nan
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    if error == 0:
        return float(mean == 0)
    return max(0.0, 1 - _within(abs(mean) / error, len(values) - 1))


def holm(p_M: Sequence[float]) -> list[float]:
    """p-values of M tests corrected for their number: below 0.05 for any test that is right by chance with probability 0.05.

    The k-th smallest is multiplied by M - k + 1, is at least the one before it, and at most 1. A value that is NaN stays so and
    counts as no test. Source: Holm 1979.
    """
    tests = sorted((p, index) for index, p in enumerate(p_M) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_M), 0.0
    for rank, (p, index) in enumerate(tests):
        largest = max(largest, min(1.0, p * (len(tests) - rank)))
        corrected[index] = largest
    return corrected


def _within(t: float, free: int) -> float:
    """P(|T| < t) of Student's t with `free` degrees of freedom. Source: Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(free))
    odd, square = free % 2, math.cos(angle) ** 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, free + 1, 2):
        total += term
        term *= square * (k - 1) / k
    sine = math.sin(angle) * total
    return 2 / math.pi * (angle + sine) if odd else sine


@cache
def _quantile(free: int) -> float:
    """The 97.5 % quantile of Student's t, by bisection."""
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if _within(middle, free) > 0.95 else (middle, high)
    return (low + high) / 2


def by_task(tasks: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    """Each distinct task once, with the mean of its episodes' values, in order of first appearance."""
    grouped: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        grouped.setdefault(task, []).append(float(value))
    return {task: sum(episodes) / len(episodes) for task, episodes in grouped.items()}


def explain(intervals: Mapping[str, Interval]) -> list[str]:
    """The reasons for missing intervals, each once, preceded by its measures unless it applies to all of them."""
    reasons: dict[str, list[str]] = {}
    for name, found in intervals.items():
        if found.note:
            reasons.setdefault(found.note, []).append(name)
    return [reason if len(names) == len(intervals) else f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
