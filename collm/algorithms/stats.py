"""Statistics about a critic: explained variance, and running moments of its targets."""

from __future__ import annotations

import torch
from torch import Tensor


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Explained variance of returns R by values V.

        1 - Var(R - V) / Var(R)

    1 is perfect, 0 is as good as a constant, below 0 is worse. NaN for fewer than two answers and for equal returns.

    Args: values, returns: (S,) of the same answers, in units of return.
    """
    if len(returns) < 2:
        return float("nan")
    variance = returns.double().var(correction=0)
    if variance < 1e-12:
        return float("nan")
    return (1 - (returns.double() - values.double()).var(correction=0) / variance).item()


def without_task_means(numbers: Tensor, tasks: Tensor) -> Tensor:
    """Subtract from each number the mean over its task, which removes differences between tasks.

    Args: numbers: (S,). tasks: (S,) task number of each. Returns: (S',), S' <= S: tasks that appear once are left out.
    """
    _, index, counts = torch.unique(tasks, return_inverse=True, return_counts=True)
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add(0, index, numbers.double())
    return (numbers.double() - (sums / counts)[index])[counts[index] > 1]


class RunningMoments:
    """Running mean and standard deviation of the critic's targets, for target normalization.

    Exponential averages of the first two moments, corrected for their initial value of zero.
    Source: PopArt, arXiv:1602.07714; MAPPO, arXiv:2103.01955.
    """

    def __init__(self, rate: float = 0.1):
        self.rate, self.weight, self.first, self.second = rate, 0.0, 0.0, 0.0

    def update(self, targets: Tensor) -> None:
        self.weight += self.rate * (1 - self.weight)
        self.first += self.rate * (targets.double().mean().item() - self.first)
        self.second += self.rate * ((targets.double() ** 2).mean().item() - self.second)

    @property
    def mean(self) -> float:
        return self.first / self.weight if self.weight else 0.0

    @property
    def deviation(self) -> float:
        if not self.weight:
            return 1.0
        return max(self.second / self.weight - self.mean**2, 1e-8) ** 0.5
