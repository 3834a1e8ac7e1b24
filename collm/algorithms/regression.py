"""Linear regression that follows a moving target: what a handful of numbers says of the return."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def ridge(features_SM: Tensor, targets_S: Tensor, strength: float) -> Tensor:
    """Least squares with an unpenalized constant, its slopes shrunk in units of each feature's own deviation.

        minimize  1/S sum_s (y_s - c - x_s . beta)^2 + strength * sum_m Var(x_m) beta_m^2

    A feature that never varies gets slope 0. Args: features_SM: (S, M), targets_S: (S,). Returns: predictions (S,) of the
    samples themselves.
    """
    moments = Moments(features_SM.shape[1])
    moments.add(features_SM, targets_S)
    return moments.predict(features_SM, strength)


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
        """(S,) of features (S, M); 0 before any sample was counted."""
        M = self.num_features
        if not self.weight or not len(features_SM):
            return features_SM.new_zeros(len(features_SM))
        covariance = self.second[:M, :M]
        variance = covariance.diagonal()
        varies = variance > 1e-10 * (1 + self.mean[:M] ** 2)
        slopes = torch.zeros(M, dtype=torch.float64)
        if varies.any():
            deviation = variance[varies].sqrt()
            correlation = covariance[varies][:, varies] / torch.outer(deviation, deviation)
            penalty = strength * torch.eye(len(deviation), dtype=torch.float64) + 1e-9 * torch.eye(len(deviation))
            slopes[varies] = torch.linalg.solve(correlation + penalty, self.second[:M, M][varies] / deviation) / deviation
        return ((features_SM.double() - self.mean[:M]) @ slopes + self.mean[M]).to(features_SM)


class TurnRegression(nn.Module):
    """One ridge regression per turn, from what a world counts before that turn to the return that follows.

    The moments of earlier iterations fade by `keep` per iteration, as the policies that made them do. `strength` counts
    samples: with that many, a slope is half of what they say.
    """

    def __init__(self, num_features: int, turns: int, *, keep: float = 0.9, strength: float = 4.0):
        super().__init__()
        self.keep, self.strength = keep, strength
        self.turns = nn.ModuleList(Moments(num_features) for _ in range(turns))

    def of(self, turn: int) -> Moments:
        """The regression of a turn; turns beyond the last share its own."""
        found = self.turns[min(turn, len(self.turns) - 1)]
        assert isinstance(found, Moments)
        return found

    def forward(self, features_ETM: Tensor) -> Tensor:
        """(E, T) expected returns of features (E, T, M)."""
        columns = []
        for t in range(features_ETM.shape[1]):
            moments = self.of(t)
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
