"""Ridge regression to the return: online with exponential forgetting from a few features, and in closed form from many."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collm.algorithms.stats import without_task_means


class Moments(nn.Module):
    """First and second moments of features and target, from which a ridge regression is solved; older samples fade.

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
        """Add samples, features (S, M) and targets (S,), after multiplying the weight of earlier ones by `keep`."""
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
        """Predicted targets (S,) of features (S, M): ridge regression with an unpenalized constant.

            minimize  1/S sum_s (y_s - c - x_s . beta)^2 + strength * sum_m Var(x_m) beta_m^2

        The penalty is in units of each feature's variance. A feature that never varies gets slope 0. Predicts 0 before any
        sample was added.
        """
        M = self.num_features
        if not self.weight or not len(features_SM):
            return features_SM.new_zeros(len(features_SM))
        slopes = self._slopes(strength)
        return ((features_SM.double() - self.mean[:M]) @ slopes + self.mean[M]).to(features_SM)

    def explained(self, free: float, squared: float) -> float:
        """Adjusted R^2: the fraction of the target's variance that least squares explains, corrected for degrees of freedom.

            1 - (SSR / (free - M squared / free)) / (SST / free),   M the number of features that vary

        With weights w_s, least squares on pure noise leaves sum_s w_s - M sum_s w_s^2 / sum_s w_s variances as residuals, which
        this corrects for.

        Args:
            free: sum_s w_s over the independent samples of these moments, w_s the present weight of each.
            squared: sum_s w_s^2 over the same samples.
        Returns: a fraction; NaN if nothing varies or the samples are too few.
        """
        M = self.num_features
        slopes, total = self._slopes(0.0), self.second[M, M].item()
        used = int((slopes != 0).sum()) * squared / max(free, 1e-12)
        if total < 1e-12 or free - used < 1:
            return float("nan")
        missed = total - (2 * self.second[:M, M] - self.second[:M, :M] @ slopes) @ slopes
        return 1 - missed.item() / total * free / (free - used)

    def varies(self) -> Tensor:
        """(M,) bool: the features that vary."""
        M = self.num_features
        return self.second[:M, :M].diagonal() > 1e-10 * (1 + self.mean[:M] ** 2)

    def _slopes(self, strength: float) -> Tensor:
        """Slopes (M,); 0 for features that never vary."""
        M = self.num_features
        covariance = self.second[:M, :M]
        varies = self.varies()
        slopes = torch.zeros(M, dtype=torch.float64)
        if varies.any():
            deviation = covariance.diagonal()[varies].sqrt()
            correlation = covariance[varies][:, varies] / torch.outer(deviation, deviation)
            penalty = strength * torch.eye(len(deviation), dtype=torch.float64) + 1e-9 * torch.eye(len(deviation))
            slopes[varies] = torch.linalg.solve(correlation + penalty, self.second[:M, M][varies] / deviation) / deviation
        return slopes


class MetricCeiling(nn.Module):
    """Metric ceiling: the fraction of the returns' variance within tasks that least squares on the features explains, per turn.

    Unlike a critic's prediction, the slopes are fitted to the returns that they explain; the fraction is adjusted for the
    number of features. The weight of earlier iterations is multiplied by `keep` per iteration.
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
        """Add one iteration's samples of a turn and return the explained fraction; NaN if too few tasks were played twice.

        Args: features_SM: (S, M). returns_S: (S,) in units of return. tasks_S: (S,) task number of each. Turns beyond the last
        share its moments.
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
    """Metric regression: one ridge regression per turn, from environment metrics before the turn to the return that follows.

    The weight of earlier iterations is multiplied by `keep` per iteration, since their policies are outdated. The penalty is
    `strength` samples, and `per_feature` more for each feature that varies: with that many samples, a slope is half of its
    least-squares value. M features that explain a fraction R^2 are best penalized with M (1 - R^2) / R^2 samples.
    Source: Hoerl, Kennard and Baldwin 1975, M sigma^2 / |beta|^2, for features of unit variance.
    """

    def __init__(self, num_features: int, turns: int, *, keep: float = 0.9, strength: float = 20.0, per_feature: float = 0.0):
        super().__init__()
        self.keep, self.strength, self.per_feature = keep, strength, per_feature
        self.turns = nn.ModuleList(Moments(num_features) for _ in range(turns))

    def of(self, turn: int) -> Moments:
        """The regression of a turn; turns beyond the last share the last one."""
        found = self.turns[min(turn, len(self.turns) - 1)]
        assert isinstance(found, Moments)
        return found

    def forward(self, features_ETM: Tensor) -> Tensor:
        """Predicted returns (E, T) of features (E, T, M). A turn without samples uses the last one before it."""
        columns = []
        moments = self.of(0)
        for t in range(features_ETM.shape[1]):
            moments = self.of(t) if self.of(t).weight else moments
            samples = self.strength + self.per_feature * int(moments.varies().sum())
            columns.append(moments.predict(features_ETM[:, t], samples / max(float(moments.weight), 1.0)))
        return torch.stack(columns, 1)

    def learn(self, features_ETM: Tensor, returns_ET: Tensor, chosen_ET: Tensor) -> None:
        """Add one iteration's samples, those where `chosen_ET` is True. returns_ET: (E, T), in units of return."""
        T = returns_ET.shape[1]
        for position in range(min(T, len(self.turns))):
            last = position == len(self.turns) - 1
            columns = slice(position, T if last else position + 1)
            chosen = chosen_ET[:, columns]
            self.of(position).add(features_ETM[:, columns][chosen], returns_ET[:, columns][chosen], self.keep)


class TaskRidge:
    """Ridge regression in closed form, from many features to the return, whose penalty is chosen by leaving tasks out.

        minimize  sum_s (y_s - c - x_s . beta)^2 + strength S M |beta|^2,   x standardized

    With X = U d V' of the standardized features and H = 1/S + U diag(d^2 / (d^2 + strength S M)) U', the residuals of a task g
    under the regression that is fitted without it are

        e_g = (I - H_gg)^-1 (y_g - (H y)_g)

    The strength with the least sum of squares of these is taken. Samples must not be left out one by one: features may identify
    a task, whose other samples then predict the one left out, so that too weak a penalty would be taken. Where all samples are
    of one task, they are left out one by one all the same.

    Args:
        features_SM: (S, M). targets_S: (S,) in units of return. tasks_S: (S,) task number of each.
    Source: Allen 1974 (PRESS), for blocks of samples.
    """

    STRENGTHS = tuple(10 ** (power / 2) for power in range(-8, 5))

    def __init__(self, features_SM: Tensor, targets_S: Tensor, tasks_S: Tensor):
        features_SM, targets_S = features_SM.double(), targets_S.double()
        self.mean = features_SM.mean(0)
        deviation = features_SM.std(0, correction=0)
        self.scale = torch.where(deviation > 1e-6 * (1 + self.mean.abs()), 1 / deviation, 0.0)
        """(M,) one over the deviation; 0 for a feature that never varies."""
        self.constant = targets_S.mean()
        left_S = targets_S - self.constant
        U_SR, d_R, V_RM = torch.linalg.svd((features_SM - self.mean) * self.scale, full_matrices=False)
        penalties_P = torch.tensor(self.STRENGTHS, dtype=torch.float64) * features_SM.numel()
        errors_P = left_out_errors(U_SR, d_R, left_S, tasks_S, penalties_P).square().sum(1)
        self.penalty = float(penalties_P[errors_P.argmin()])
        self.slopes = V_RM.T @ (d_R / (d_R**2 + self.penalty) * (U_SR.T @ left_S)) * self.scale

    def __call__(self, features_SM: Tensor) -> Tensor:
        """Predicted targets (S,), in units of return."""
        return (self.constant + (features_SM.double() - self.mean) @ self.slopes).to(features_SM)


def left_out_errors(U_SR: Tensor, d_R: Tensor, left_S: Tensor, tasks_S: Tensor, penalties_P: Tensor) -> Tensor:
    """(P, S) error of each sample under the ridge regression that is fitted without its task, as in `TaskRidge`.

    Args: U_SR, d_R: left singular vectors and singular values of the centred features. left_S: (S,) centred targets.
    """
    if len(left_S) < 2:  # without it nothing is left to fit
        return torch.zeros(len(penalties_P), len(left_S), dtype=left_S.dtype)
    shrunk_PR = d_R**2 / (d_R**2 + penalties_P[:, None])
    residuals_PS = left_S - (shrunk_PR * (U_SR.T @ left_S)) @ U_SR.T
    tasks = torch.unique(tasks_S)
    groups = [tasks_S == task for task in tasks] if len(tasks) > 1 else list(torch.eye(len(left_S)).bool())
    errors_PS = torch.zeros_like(residuals_PS)
    for group_S in groups:
        U_GR = U_SR[group_S]
        H_PGG = (U_GR * shrunk_PR[:, None]) @ U_GR.T + 1 / len(left_S)
        errors_PS[:, group_S] = torch.linalg.solve(torch.eye(len(U_GR)) - H_PGG, residuals_PS[:, group_S])
    return errors_PS
