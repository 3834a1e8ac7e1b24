"""`collm.fidelity`: credit fidelity, the correlation of an algorithm's advantages with counterfactual truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from collm.runs.fidelity import Evidence, Judged
from collm.runs.open import Run, open_run
from collm.studies.intervals import FEWEST, Interval

Floats = NDArray[np.float64]
RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Agreement:
    """Correlation of advantages with counterfactual truth over some answers."""

    answers: int
    pearson: Interval
    """Pearson's correlation; the interval is the bootstrap's over episodes."""
    spearman: Interval
    """Spearman's correlation: Pearson's of the ranks."""
    ceiling: float
    """The greatest correlation that an advantage without noise could reach with this truth, which is a mean of few plays."""

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "answers": self.answers,
            "pearson": self.pearson.plain(),
            "spearman": self.spearman.plain(),
            "ceiling": self.ceiling if math.isfinite(self.ceiling) else None,
        }


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Credit fidelity of one state of a run.

    Example: found.overall.pearson  # Interval(mean=0.42, low=0.25, high=0.57, num_tasks=32)
    """

    iteration: int
    """Iterations done before."""
    overall: Agreement
    turns: Mapping[int, Agreement]
    """Turn -> agreement over the answers of this turn."""
    mismatches: int
    """Answers left out since the replay of their episode differed from the record."""
    failed: int
    """Answers left out since one of their plays failed."""

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "iteration": self.iteration,
            **self.overall.plain(),
            "turns": {str(turn): found.plain() for turn, found in self.turns.items()},
            "mismatches": self.mismatches,
            "failed": self.failed,
        }


def fidelity(
    run: Run | str | Path,
    checkpoint: str | int | None = None,
    *,
    answers: int = 64,
    plays: int = 16,
    overrides: Mapping[str, Any] | None = None,
) -> Fidelity:
    """Credit fidelity of a run: how well its algorithm's advantages agree with counterfactual truth.

    The team, critics and regressions of a checkpoint play training episodes and assign credit; nothing is learned. The truth
    about each judged answer is the mean return-to-go of playing on after it minus that of playing on after other answers of the
    agent, drawn from its own policy, with its team-mates' answers of the turn fixed: `rollout.truth.truths`.
    A team that has solved its task has little to judge: choose a checkpoint in the middle of training.

        collm.fidelity("runs/demo", 30).overall.pearson

    Args:
        checkpoint: a number of iterations or "best"; default: the last one kept.
        answers: how many answers are judged. plays: plays per answer, and other answers of each.
        overrides: `{"room.key": value}`, as in `collm evaluate`.
    Raises: RunError or ConfigError.
    """
    from collm.training.fidelity import measure, restored

    run = run if isinstance(run, Run) else open_run(run)
    number = checkpoint if checkpoint is not None else max(run.checkpoints, default=0)
    config, made, iteration = restored(run.folder, str(number), overrides or {})
    try:
        return agreement(measure(made, config, iteration, answers=answers, plays=plays))
    finally:
        made.engine.close()


def agreement(evidence: Evidence) -> Fidelity:
    """The correlations of judged answers, of all and of each turn."""
    turns = sorted({answer.turn for answer in evidence.judged})
    return Fidelity(
        evidence.iteration,
        _agreement(evidence.judged),
        {turn: _agreement([answer for answer in evidence.judged if answer.turn == turn]) for turn in turns},
        evidence.mismatches,
        evidence.failed,
    )


def _agreement(judged: Sequence[Judged]) -> Agreement:
    advantages_M = np.array([answer.advantage for answer in judged], dtype=np.float64)
    plays = min((len(answer.differences_K) for answer in judged), default=0)
    differences_MK = np.array([answer.differences_K[:plays] for answer in judged], dtype=np.float64).reshape(len(judged), plays)
    truth_M = differences_MK.mean(1) if plays else np.zeros(0)
    episodes_M = np.array([answer.episode for answer in judged])
    return Agreement(
        len(judged),
        correlated(pearson, advantages_M, truth_M, episodes_M),
        correlated(spearman, advantages_M, truth_M, episodes_M),
        ceiling(differences_MK),
    )


def pearson(x_M: Floats, y_M: Floats) -> float:
    """Pearson's correlation; NaN for fewer than three points or if one side does not vary."""
    if len(x_M) < 3:
        return math.nan
    x, y = x_M - x_M.mean(), y_M - y_M.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 1e-12 else math.nan


def spearman(x_M: Floats, y_M: Floats) -> float:
    """Spearman's correlation: Pearson's of the ranks, equal numbers with the mean of their ranks."""
    return pearson(_ranks(x_M), _ranks(y_M))


def _ranks(values_M: Floats) -> Floats:
    _, index, counts = np.unique(values_M, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[index]


def ceiling(differences_MK: Floats) -> float:
    """The greatest correlation with the mean over K plays that a number without noise could reach.

        r' = 2 r / (1 + r),   ceiling = sqrt(r')

    r is Pearson's correlation of the means over even and over odd plays; r' is the reliability of the mean over all plays.

    Args: differences_MK: (M, K) counterfactual differences of M answers.
    Returns: a correlation; 0 if the halves do not correlate, NaN if they do not vary.
    Source: Spearman 1910 and Brown 1910 (split halves); Spearman 1904 (attenuation).
    """
    if differences_MK.shape[1] < 2:
        return math.nan
    r = pearson(differences_MK[:, ::2].mean(1), differences_MK[:, 1::2].mean(1))
    return math.sqrt(max(2 * r / (1 + r), 0.0)) if r > -1 else r if math.isnan(r) else 0.0


def correlated(statistic: Callable[[Floats, Floats], float], x_M: Floats, y_M: Floats, episodes_M: NDArray[Any]) -> Interval:
    """A correlation and the percentiles 2.5 and 97.5 of 1,000 resamples of whole episodes, whose answers are dependent."""
    found = statistic(x_M, y_M)
    names = np.unique(episodes_M)
    if math.isnan(found):
        return Interval(found, None, None, len(names), "no variance to correlate")
    if len(names) < FEWEST:
        return Interval(found, None, None, len(names), f"no interval: {len(names)} episodes, at least {FEWEST} are needed")
    rows = [np.flatnonzero(episodes_M == name) for name in names]
    rng = np.random.default_rng(0)
    drawn = (np.concatenate([rows[e] for e in rng.integers(len(rows), size=len(rows))]) for _ in range(RESAMPLES))
    values = [value for chosen in drawn if math.isfinite(value := statistic(x_M[chosen], y_M[chosen]))]
    low, high = np.percentile(values, [2.5, 97.5])
    return Interval(found, float(low), float(high), len(names))
