"""Credit assignment: advantages of answers and targets of critics, from an iteration's rewards and values.

An algorithm is a return, a baseline, a critic and a loss. This module combines the first two: advantage = return - baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from collm.algorithms import advantages
from collm.algorithms.catalogue import group_estimator
from collm.learning import diagnostics, residual
from collm.learning.batch import Batch
from collm.learning.critics import Values
from collm.learning.residual import Regressions, Rows
from collm.settings.rooms import AlgorithmSettings
from collm.types import Annotation, Metrics


@dataclass(slots=True)
class Credit:
    """The tensors that every part learns from."""

    advantages_ENT: Tensor
    """(E, N, T) advantage of each answer; 0 where an agent did not act."""
    targets_ENT: Tensor
    """(E, N, T) targets of critics in units of return, minus the prediction of the metric regression."""
    wanted_ENT: Tensor
    """(E, N, T) 1 where a critic has a target, else 0."""
    features: Mapping[str, Tensor] = field(default_factory=dict)
    """As of `Values`."""


@dataclass(slots=True)
class Assignment:
    """The result of credit assignment."""

    credit: Credit
    annotations: list[dict[tuple[int, str], Annotation]]
    """For each episode of the batch: (turn, agent) -> value, TD error and advantage."""
    metrics: Metrics


def assign_returns(batch: Batch, settings: AlgorithmSettings, regressions: Regressions) -> Assignment:
    """Credit without a critic: returns of whole episodes or turn trees minus a baseline from their siblings."""
    advantages_ET = from_tree(batch, settings) if settings.tree else from_siblings(batch, settings)
    advantages_ENT = advantages_ET[:, None] * batch.live_ENT
    metrics: Metrics = {}
    if regressions.teammates:
        baselines_ENT = torch.zeros(batch.shape)  # the group baseline is subtracted already
        rows = regressions.read(batch)
        advantages_ENT, metrics = without_teammates(batch, regressions, rows, advantages_ENT, baselines_ENT)
    advantages_ENT = _normalized(advantages_ENT, batch, settings)
    metrics |= diagnostics.deviations(batch, advantages_ENT)
    return Assignment(
        Credit(advantages_ENT, torch.zeros(batch.shape), torch.zeros(batch.shape)), _annotations(batch, advantages_ENT), metrics
    )


def assign_values(
    batch: Batch,
    text: Values,
    wanted_ENT: Tensor,
    regressions: Regressions,
    critics: Mapping[str, str],
    settings: AlgorithmSettings,
    *,
    critic_lam: float,
) -> Assignment:
    """Credit with values: a value is the prediction of the metric regression plus the critic's prediction from text.

    The regressions predict first and learn afterwards. The text critic's targets are the residuals of the updated regression:
    if both learned the same residual, their sum would overshoot.

    Args:
        text: predictions of the critics before this update.
        wanted_ENT: (E, N, T) 1 where critics have targets.
        critics: critic's label in metrics -> an agent that it predicts values for.
        critic_lam: lambda of the critics' targets.
    """
    kind, gamma = settings.critic_kind, settings.gamma
    rows = regressions.read(batch)
    predicted_ENT = residual.predict_returns(regressions.returns, rows, batch, text.read_ENT)
    values_ENT = text.values_ENT + predicted_ENT
    rewards_ENT = batch.rewards_ET[:, None].expand(batch.shape)
    following_ENT = values_ENT if kind == "V" else nn.functional.pad(values_ENT, (0, 1))
    targets_ENT = advantages.lambda_returns(rewards_ENT, following_ENT, wanted_ENT, gamma=gamma, lam=critic_lam)
    metrics: Metrics = {}
    if kind == "Q":
        advantages_ENT = from_alternatives(values_ENT, predicted_ENT, text)
    else:
        advantages_ENT = advantages.td_lambda(rewards_ENT, values_ENT, wanted_ENT, gamma=gamma, lam=settings.lam)
    if regressions.teammates:
        returns_ENT, baselines_ENT = advantages_ENT, torch.zeros(batch.shape)  # Q's baseline is subtracted already
        if kind == "V":
            returns_ENT = advantages.lambda_returns(rewards_ENT, values_ENT, wanted_ENT, gamma=gamma, lam=settings.lam)
            baselines_ENT = values_ENT[..., :-1]
        advantages_ENT, metrics = without_teammates(batch, regressions, rows, returns_ENT, baselines_ENT)
    advantages_ENT = _normalized(advantages_ENT * batch.live_ENT, batch, settings)
    metrics |= diagnostics.deviations(batch, advantages_ENT)
    metrics |= diagnostics.measure_ceiling(regressions.ceiling, batch, rows[regressions.everything], gamma=gamma)
    metrics |= diagnostics.explain(batch, values_ENT, wanted_ENT, critics, gamma=gamma)
    residual.learn_returns(regressions.returns, rows, batch, values_ENT, text.read_ENT, gamma=gamma, kind=kind)
    learned_ENT = residual.predict_returns(regressions.returns, rows, batch, text.read_ENT)
    credit = Credit(advantages_ENT, targets_ENT - learned_ENT[..., : targets_ENT.shape[-1]], wanted_ENT, text.features)
    errors_ENT = rewards_ENT + gamma * values_ENT[..., 1:] - values_ENT[..., :-1] if kind == "V" else None
    return Assignment(credit, _annotations(batch, advantages_ENT, values_ENT, errors_ENT), metrics)


def without_teammates(
    batch: Batch, regressions: Regressions, rows: Rows, returns_ENT: Tensor, baselines_ENT: Tensor
) -> tuple[Tensor, Metrics]:
    """Advantages (E, N, T): returns minus difference baselines; and metrics.

    Regressions and learned effects predict first and learn from this iteration afterwards: `residual.predict_teammates` says
    for which returns the gradient stays unbiased.
    """
    changes_ENTM, known_ENT = residual.teammates_changes(batch, rows, regressions)
    expected_ENT = residual.predict_teammates(regressions.teammates, changes_ENTM, known_ENT, baselines_ENT)
    residual.learn_teammates(regressions.teammates, changes_ENTM, known_ENT, baselines_ENT, returns_ENT)
    advantages_ENT = advantages.difference(returns_ENT, expected_ENT, batch.live_ENT)
    if regressions.effects is None:
        return advantages_ENT, diagnostics.replayed(batch)
    regressions.effects.learn(batch)
    live_ENT = batch.live_ENT.bool()
    return advantages_ENT, {"critic/effects": known_ENT[live_ENT].float().mean().item() if live_ENT.any() else 0.0}


def from_siblings(batch: Batch, settings: AlgorithmSettings) -> Tensor:
    """Advantages (E, T) of whole episodes: return-to-go at turn t minus a baseline from the siblings' returns-to-go at t.

    A sibling that has ended counts with return 0. An episode whose siblings all failed gets advantage 0 from a group baseline.
    """
    estimator = group_estimator(settings.baseline)
    returns_ET = advantages.discounted_returns(batch.rewards_ET, gamma=settings.gamma)
    parts = []
    for returns_GT in returns_ET.split([len(group.episodes) for group in batch.groups]):
        compared_GT = estimator(returns_GT)
        parts.append(advantages.group_std(compared_GT, returns_GT) if settings.normalize == "group" else compared_GT)
    return torch.cat(parts)


def from_tree(batch: Batch, settings: AlgorithmSettings) -> Tensor:
    """Advantages (E, T) of turn trees: each joint action among its siblings at the node."""
    estimator = group_estimator(settings.baseline)
    advantages_ET, e = torch.zeros_like(batch.rewards_ET), 0
    for group in batch.groups:
        rewards = [[turn.reward for turn in episode.turns] for episode in group.episodes]
        returns = advantages.tree_returns(rewards, [e.path for e in group.episodes], gamma=settings.gamma)
        by_node = advantages.tree_advantages(returns, estimator, by_deviation=settings.normalize == "group")
        for episode in group.episodes:
            for t in range(episode.own_from, len(episode.turns)):
                advantages_ET[e, t] = by_node[episode.path[: t + 1]]
            e += 1
    return advantages_ET


def from_alternatives(values_ENT: Tensor, predicted_ENT: Tensor, text: Values) -> Tensor:
    """Advantages (E, N, T): Q of the joint action taken minus the mean Q over each agent's resampled answers."""
    advantages_S = torch.zeros(values_ENT.numel())
    for slot_M, text_MK in text.alternatives:
        q_MK = text_MK + predicted_ENT.flatten()[slot_M, None]
        advantages_S[slot_M] = advantages.counterfactual(values_ENT.flatten()[slot_M], q_MK)
    return advantages_S.view(values_ENT.shape)


def _normalized(advantages_ENT: Tensor, batch: Batch, settings: AlgorithmSettings) -> Tensor:
    """Advantages divided by each agent's standard deviation under `normalize="agent"`; z-scored with a critic."""
    if settings.normalize != "agent":
        return advantages_ENT
    recentre = settings.has_critic
    parts = [
        advantages.normalize(advantages_ENT[:, n], batch.live_ENT[:, n], recentre=recentre) for n in range(len(batch.agents))
    ]
    return torch.stack(parts, 1)


def _annotations(
    batch: Batch, advantages_ENT: Tensor, values_ENT: Tensor | None = None, errors_ENT: Tensor | None = None
) -> list[dict[tuple[int, str], Annotation]]:
    """For each episode of the batch: (turn, agent) -> value, TD error and advantage of the answer."""

    def at(numbers_ENT: Tensor | None, e: int, n: int, t: int) -> float | None:
        return None if numbers_ENT is None else numbers_ENT[e, n, t].item()

    found: list[dict[tuple[int, str], Annotation]] = [{} for _ in batch.episodes]
    for e, t, agent, n in batch.answers():
        found[e][t, agent] = Annotation(at(values_ENT, e, n, t), at(errors_ENT, e, n, t), at(advantages_ENT, e, n, t))
    return found
