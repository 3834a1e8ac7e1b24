"""Regressions on environment metrics: the metric regression of returns, and the difference baseline.

`predict_*` returns predictions and changes nothing; `learn_*` adds an iteration's samples and returns nothing. Samples are
predicted before they are learned from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from collm.algorithms.advantages import discounted_returns
from collm.algorithms.regression import MetricCeiling, TurnRegression
from collm.errors import TrainingError
from collm.learning.batch import Batch

TURNS = 32
"""Number of turns with a separate regression; later turns share the last one."""


class Regressions:
    """The regressions of a run."""

    metric_names: tuple[str, ...]
    """The environment metrics that the regressions read beside the rewards; empty for rewards alone."""
    ceiling_names: tuple[str, ...]
    """Those that the metric ceiling reads: all."""
    metrics: TurnRegression | None
    """The metric regression, from environment metrics and rewards so far to the return; None if values are from text alone."""
    teammates: nn.ModuleList
    """For each agent, a regression from the change of metrics by its team-mates' answers alone to the return minus its
    baseline; empty without the difference baseline."""
    ceiling: MetricCeiling | None
    """The metric ceiling, for reports; None without a critic."""

    def __init__(
        self,
        metric_names: Sequence[str],
        num_agents: int,
        *,
        critic: bool,
        metrics: bool,
        teammates: bool,
        read_metrics: bool = True,
    ):
        self.ceiling_names = tuple(metric_names)
        self.metric_names = self.ceiling_names if read_metrics else ()
        width = 2 + len(self.metric_names)
        self.metrics = TurnRegression(width, TURNS) if metrics else None
        self.teammates = nn.ModuleList(TurnRegression(width, TURNS) for _ in range(num_agents if teammates else 0))
        self.ceiling = MetricCeiling(2 + len(self.ceiling_names), TURNS) if critic else None

    def modules(self) -> dict[str, nn.Module]:
        """File name -> module of a checkpoint."""
        found: dict[str, nn.Module] = {}
        if self.ceiling is not None:
            found["yardstick"] = self.ceiling
        if self.metrics is not None:
            found["regression"] = self.metrics
        if self.teammates:
            found["without"] = self.teammates
        return found


def features(batch: Batch, metric_names: Sequence[str]) -> Tensor:
    """Features (E, T + 1, M) before each turn and after the last one: sum of rewards so far, last raw reward, environment
    metrics. Raises TrainingError for a metric that is not finite."""
    E, _, T = batch.shape
    rows = np.zeros((E, T + 1, 2 + len(metric_names)))
    for e, episode in enumerate(batch.episodes):
        so_far = 0.0
        for t in range(len(episode.turns) + 1):
            last = episode.turns[t - 1].raw_reward if t else 0.0
            so_far += episode.turns[t - 1].reward if t else 0.0
            ended = t == len(episode.turns)
            reported = episode.metrics if ended else episode.turns[t].metrics
            rows[e, t] = [so_far, last, *_numbers(reported, metric_names)]
            bad = [name for name, x in zip(metric_names, rows[e, t, 2:], strict=True) if not math.isfinite(x)]
            if bad and (not ended or episode.truncated):
                raise TrainingError(
                    f"the environment metric {bad[0]!r} is {reported[bad[0]]!r} before turn {t} of episode {e} (task "
                    f"{episode.label}), not a finite number. Nothing was learned from this iteration. `collm check` names "
                    "what an environment may report."
                )
    return torch.from_numpy(rows).float()


def counterfactual_features(batch: Batch, agent: str, metric_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Features (E, T, M) after each turn of the no-op counterfactual, with the agent's answer empty; and (E, T) bool where they
    are known and finite."""
    E, _, T = batch.shape
    rows, known = np.zeros((E, T, 2 + len(metric_names))), np.zeros((E, T), dtype=bool)
    for e, episode in enumerate(batch.episodes):
        so_far = 0.0
        for t, turn in enumerate(episode.turns):
            if agent in turn.no_op and t >= episode.own_from:
                replayed = turn.no_op[agent]
                numbers = [so_far + replayed.reward, replayed.raw_reward, *_numbers(replayed.metrics, metric_names)]
                if all(map(math.isfinite, numbers)):
                    rows[e, t], known[e, t] = numbers, True
            so_far += turn.reward
    return torch.from_numpy(rows).float(), torch.from_numpy(known)


def predict_returns(regression: TurnRegression | None, features_ETM: Tensor, read_ENT: Tensor) -> Tensor:
    """Predicted returns (E, N, T or T + 1) where a critic computes a value; 0 elsewhere, and without a regression."""
    predicted_ENT = torch.zeros_like(read_ENT)
    if regression is None:
        return predicted_ENT
    predicted_ET = regression(features_ETM[:, : read_ENT.shape[-1]])
    return torch.where(read_ENT.bool(), predicted_ET[:, None], predicted_ENT)


def learn_returns(
    regression: TurnRegression | None,
    features_ETM: Tensor,
    batch: Batch,
    values_ENT: Tensor,
    read_ENT: Tensor,
    *,
    gamma: float,
    kind: str,
) -> None:
    """Add this iteration's returns to the metric regression.

    The return of a truncated episode is bootstrapped with V of its final history; for Q such an episode is left out.
    """
    if regression is None:
        return
    rewards_ET, counted_ET = batch.rewards_ET, batch.complete_ET
    if kind == "V":
        speaking_ENT = read_ENT[..., 1:]
        following_ET = (values_ENT[..., 1:] * speaking_ENT).sum(1) / speaking_ENT.sum(1).clamp_min(1)
        rewards_ET = rewards_ET + gamma * following_ET * (batch.last_ET & batch.truncated_E[:, None])
        counted_ET = batch.played_ET
    returns_ET = discounted_returns(rewards_ET, gamma=gamma)
    regression.learn(features_ETM[:, :-1], returns_ET, counted_ET)


def teammates_changes(batch: Batch, features_ETM: Tensor, metric_names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(E, N, T, M) change of the features in a turn caused by each agent's team-mates alone, centred over the iteration; and
    (E, N, T) bool where the no-op counterfactual is known."""
    changes, known = [], []
    for agent in batch.agents:
        after_ETM, known_ET = counterfactual_features(batch, agent, metric_names)
        changes.append(centred(after_ETM - features_ETM[:, :-1], known_ET))
        known.append(known_ET)
    return torch.stack(changes, 1), torch.stack(known, 1)


def predict_teammates(regressions: nn.ModuleList, changes_ENTM: Tensor, known_ENT: Tensor, baselines_ENT: Tensor) -> Tensor:
    """Difference baseline of each answer, (E, N, T) in units of return.

        b_i(h_t, a_-i,t) = b(h_t) + beta . (Delta - mean Delta),   beta: ridge regression of G_t - b(h_t) on Delta

    b is V of a critic, or the baseline of a group method. Where the counterfactual is unknown, b_i = b.

    Delta is the change of the environment metrics by the team-mates' answers alone and does not depend on agent i's answer: see
    `algorithms.advantages.difference`. Delta and G - b are centred within the iteration, so that b_i equals b on average. A
    constant term would track the same rise of returns as b, so that correct answers get negative advantages until both settle.

    Args: changes_ENTM: (E, N, T, M) Delta. known_ENT: (E, N, T) bool. baselines_ENT: (E, N, T) b, in units of return.
    """
    baselines_ENT = baselines_ENT.clone()
    for n, regression in enumerate(regressions):
        baselines_ENT[:, n] += torch.where(known_ENT[:, n], regression(changes_ENTM[:, n]), 0.0)
    return baselines_ENT


def learn_teammates(
    regressions: nn.ModuleList, changes_ENTM: Tensor, known_ENT: Tensor, baselines_ENT: Tensor, returns_ENT: Tensor
) -> None:
    """Add this iteration's samples: centred G - b against Delta, as in `predict_teammates`. returns_ENT: (E, N, T) G."""
    for n, regression in enumerate(regressions):
        left_ET = centred((returns_ENT[:, n] - baselines_ENT[:, n])[..., None], known_ENT[:, n])[..., 0]
        assert isinstance(regression, TurnRegression)
        regression.learn(changes_ENTM[:, n], left_ET, known_ENT[:, n])


def centred(numbers_ETM: Tensor, chosen_ET: Tensor) -> Tensor:
    """Numbers (E, T, M) minus their mean over the chosen episodes of each turn; 0 where not chosen."""
    chosen_ET1 = chosen_ET[..., None]
    kept_ETM = torch.where(chosen_ET1, numbers_ETM, 0.0)  # unchosen numbers may be NaN
    return kept_ETM - chosen_ET1 * kept_ETM.sum(0) / chosen_ET1.sum(0).clamp_min(1)


def _numbers(reported: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """The named metrics as floats: 0 if it is not reported, NaN if it is not a number."""
    return [_number(reported.get(name, 0.0)) for name in names]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
