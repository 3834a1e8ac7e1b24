"""Linear regression that follows a moving target: what a handful of numbers says of the return."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collm.algorithms.stats import without_task_means


class Moments(nn.Module):
    """First and second moments of features and target, from which a ridge regression is solved; older ones fade.

    Example: Moments(2).add(features of one iteration, returns), then .predict(features of the next, strength)
    """

    weight: Tensor
    mean: Tensor
    second: Tensor

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features
        size = num_features + 1  # the target is the last
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("second", torch.zeros(size, size, dtype=torch.float64))

    @torch.no_grad()
    def add(self, features_SM: Tensor, targets_S: Tensor, keep: float = 1.0) -> None:
        """Count new samples, after the old ones' weight is multiplied by `keep`."""
        if not len(targets_S):
            return
        rows = torch.cat([features_SM, targets_S[:, None]], 1).double()
        before = self.weight * keep
        total = before + len(rows)
        new_mean = (before * self.mean + rows.sum(0)) / total
        spread = (rows - new_mean).T @ (rows - new_mean)
        moved = torch.outer(self.mean - new_mean, self.mean - new_mean)  # around the new mean
        self.second.copy_((before * (self.second + moved) + spread) / total)
        self.mean.copy_(new_mean)
        self.weight.copy_(total)

    def predict(self, features_SM: Tensor, strength: float) -> Tensor:
        """(S,) of features (S, M), 0 before any sample was counted. Least squares with an unpenalized constant, slopes shrunk
        in units of each feature's own deviation:

            minimize  1/S sum_s (y_s - c - x_s . beta)^2 + strength * sum_m Var(x_m) beta_m^2

        A feature that never varies gets slope 0.
        """
        M = self.num_features
        if not self.weight or not len(features_SM):
            return features_SM.new_zeros(len(features_SM))
        slopes = self._slopes(strength)
        return ((features_SM.double() - self.mean[:M]) @ slopes + self.mean[M]).to(features_SM)

    def explained(self, free: float, squared: float) -> float:
        """Share of the target's variance that least squares explains, corrected for the number M of features that vary.

            1 - (SSR / (free - M squared / free)) / (SST / free)

        NaN where nothing varies or too little is known.

        Args: free, squared: sum_s w_s and sum_s w_s^2 over the independent samples behind these moments, w_s the weight left of
        each: what slopes fitted with these weights leave of pure noise is sum_s w_s - M sum_s w_s^2 / sum_s w_s variances.
        """
        M = self.num_features
        slopes, total = self._slopes(0.0), self.second[M, M].item()
        used = int((slopes != 0).sum()) * squared / max(free, 1e-12)
        if total < 1e-12 or free - used < 1:
            return float("nan")
        missed = total - (2 * self.second[:M, M] - self.second[:M, :M] @ slopes) @ slopes
        return 1 - missed.item() / total * free / (free - used)

    def _slopes(self, strength: float) -> Tensor:
        """(M,), 0 for features that never vary."""
        M = self.num_features
        covariance = self.second[:M, :M]
        variance = covariance.diagonal()
        varies = variance > 1e-10 * (1 + self.mean[:M] ** 2)
        slopes = torch.zeros(M, dtype=torch.float64)
        if varies.any():
            deviation = variance[varies].sqrt()
            correlation = covariance[varies][:, varies] / torch.outer(deviation, deviation)
            penalty = strength * torch.eye(len(deviation), dtype=torch.float64) + 1e-9 * torch.eye(len(deviation))
            slopes[varies] = torch.linalg.solve(correlation + penalty, self.second[:M, M][varies] / deviation) / deviation
        return slopes


class MetricCeiling(nn.Module):
    """What least squares on some numbers explains of the returns' variance within tasks, turn by turn, in recent iterations.

    Unlike a critic's expectation, these slopes have seen the returns they explain; the count of numbers is corrected for.
    Older iterations fade by `keep`.
    """

    free: Tensor
    squared: Tensor

    def __init__(self, num_features: int, turns: int, *, keep: float = 0.9):
        super().__init__()
        self.keep = keep
        self.turns = nn.ModuleList(Moments(num_features) for _ in range(turns))
        self.register_buffer("free", torch.zeros(turns, dtype=torch.float64))
        self.register_buffer("squared", torch.zeros(turns, dtype=torch.float64))

    def measure(self, turn: int, features_SM: Tensor, returns_S: Tensor, tasks_S: Tensor) -> float:
        """Count an iteration's samples (S,) of a turn, then tell the share; NaN where too few tasks were played twice.

        Turns beyond the last share its moments.
        """
        turn = min(turn, len(self.turns) - 1)
        moments = self.turns[turn]
        assert isinstance(moments, Moments)
        free = len(tasks_S) - len(torch.unique(tasks_S))
        if free:
            centred = torch.stack([without_task_means(column, tasks_S) for column in features_SM.T], 1)
            moments.add(centred, without_task_means(returns_S, tasks_S), self.keep)
            self.free[turn] = self.keep * self.free[turn] + free
            self.squared[turn] = self.keep**2 * self.squared[turn] + free
        return moments.explained(self.free[turn].item(), self.squared[turn].item())


class TurnRegression(nn.Module):
    """One ridge regression per turn, from what a world counts before that turn to the return that follows.

    The moments of earlier iterations fade by `keep` per iteration, as the policies that made them do. `strength` counts
    samples: with that many, a slope is half of what they say.
    """

    def __init__(self, num_features: int, turns: int, *, keep: float = 0.9, strength: float = 20.0):
        super().__init__()
        self.keep, self.strength = keep, strength
        self.turns = nn.ModuleList(Moments(num_features) for _ in range(turns))

    def of(self, turn: int) -> Moments:
        """The regression of a turn; turns beyond the last share its own."""
        found = self.turns[min(turn, len(self.turns) - 1)]
        assert isinstance(found, Moments)
        return found

    def forward(self, features_ETM: Tensor) -> Tensor:
        """(E, T) expected returns of features (E, T, M). A turn without samples is judged as the last before it."""
        columns = []
        moments = self.of(0)
        for t in range(features_ETM.shape[1]):
            moments = self.of(t) if self.of(t).weight else moments
            strength = self.strength / max(float(moments.weight), 1.0)
            columns.append(moments.predict(features_ETM[:, t], strength))
        return torch.stack(columns, 1)

    def learn(self, features_ETM: Tensor, returns_ET: Tensor, chosen_ET: Tensor) -> None:
        """Count one iteration's samples: those where `chosen_ET` is True. returns_ET: (E, T), in units of return."""
        T = returns_ET.shape[1]
        for position in range(min(T, len(self.turns))):
            last = position == len(self.turns) - 1
            columns = slice(position, T if last else position + 1)
            chosen = chosen_ET[:, columns]
            self.of(position).add(features_ETM[:, columns][chosen], returns_ET[:, columns][chosen], self.keep)
