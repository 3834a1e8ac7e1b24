"""How well critics explain returns, measured before the update on the new episodes."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from collm.algorithms.advantages import discounted_returns
from collm.algorithms.regression import MetricCeiling
from collm.algorithms.stats import explained_variance, without_task_means
from collm.learning.batch import Batch
from collm.types import Metrics


def measure_ceiling(ceiling: MetricCeiling | None, batch: Batch, features_ETM: Tensor, *, gamma: float) -> Metrics:
    """Per turn t: `ceiling_turn_t`, the metric ceiling over recent iterations (the fraction of the variance within tasks that
    least squares on the environment metrics explains); and, in squared units of return, the sum of squared deviations of
    returns from their task's mean (`spread_turn_t`) and from the mean of all (`variation_turn_t`)."""
    metrics: Metrics = {}
    if ceiling is None:
        return metrics
    returns_ET = discounted_returns(batch.rewards_ET, gamma=gamma)
    for t in range(returns_ET.shape[1]):
        chosen = batch.complete_ET[:, t]
        returns, tasks = returns_ET[chosen, t], batch.tasks_E[chosen]
        metrics[f"ceiling_turn_{t}"] = ceiling.measure(t, features_ETM[chosen, t], returns, tasks)
        metrics[f"spread_turn_{t}"] = without_task_means(returns, tasks).square().sum().item()
        metrics[f"variation_turn_{t}"] = (returns.double() - returns.double().mean()).square().sum().item()
    return metrics


def explain(batch: Batch, values_ENT: Tensor, wanted_ENT: Tensor, critics: Mapping[str, str], *, gamma: float) -> Metrics:
    """Lowest and highest return; mean value and explained variance per turn of each critic: over all episodes, and within tasks
    (task means removed).

    Args:
        critics: critic's label in metrics -> an agent that it predicts values for.
        wanted_ENT: (E, N, T) 1 where critics have targets.
    """
    metrics: Metrics = {}
    returns_ET = discounted_returns(batch.rewards_ET, gamma=gamma)
    if batch.complete_ET.any():
        returns = returns_ET[batch.complete_ET]
        metrics |= {"return_lowest": returns.min().item(), "return_highest": returns.max().item()}
    for label, agent in critics.items():
        n = batch.agents.index(agent)
        live_ET = wanted_ENT[:, n].bool() & ~batch.truncated_E[:, None]
        values_ET = values_ENT[:, n, : live_ET.shape[1]]
        metrics[f"{label}/value"] = values_ET[live_ET].mean().item() if live_ET.any() else math.nan
        for t in range(live_ET.shape[1]):
            chosen = live_ET[:, t]
            values, returns, tasks = values_ET[chosen, t], returns_ET[chosen, t], batch.tasks_E[chosen]
            metrics[f"{label}/explained_variance_turn_{t}"] = explained_variance(values, returns)
            within = explained_variance(without_task_means(values, tasks), without_task_means(returns, tasks))
            metrics[f"{label}/explained_within_tasks_turn_{t}"] = within
    return metrics


def deviations(batch: Batch, advantages_ENT: Tensor) -> Metrics:
    """The standard deviation of each agent's advantages, as they are trained with."""
    metrics: Metrics = {}
    for n, agent in enumerate(batch.agents):
        chosen = advantages_ENT[:, n][batch.live_ENT[:, n].bool()]
        metrics[f"{agent}/advantage_deviation"] = chosen.std(correction=0).item() if len(chosen) else 0.0
    return metrics


def replayed(batch: Batch) -> Metrics:
    """Fractions of answers: `critic/replayed`, whose no-op counterfactual is known; and `critic/replay_mismatch`, whose replay
    came to other observations or metrics before the turn than were recorded."""
    turns = [turn for e in batch.episodes for turn in e.turns[e.own_from :]]
    fractions = {
        name: [sum(o.matches is kind for o in turn.no_op.values()) / len(turn.completions) for turn in turns]
        for name, kind in (("critic/replayed", True), ("critic/replay_mismatch", False))
    }
    return {name: sum(shares) / max(1, len(shares)) for name, shares in fractions.items()}
