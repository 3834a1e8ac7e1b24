"""Credit: which estimator turns an iteration's rewards and values into advantages, as the settings say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from collm.algorithms import advantages
from collm.algorithms.catalogue import GROUP_ESTIMATORS
from collm.config import AlgorithmSettings
from collm.training.critics import Critics, Metrics
from collm.training.pack import Batch


def assign(
    batch: Batch, values: Tensor | None, critics: Critics, settings: AlgorithmSettings, metrics: Metrics
) -> tuple[Tensor, Tensor]:
    """Advantages and critic targets, (E, N, T) each, 0 where an agent did not act.

    Args: values: V (E, N, T + 1) or Q (E, N, T) before this iteration's update; None without a critic.
    """
    rewards_ENT = batch.rewards_ET[:, None].expand(batch.shape)
    targets_ENT = torch.zeros(batch.shape)
    gamma = settings.gamma
    if values is None:
        advantages_ENT = (from_tree(batch, settings) if settings.tree else from_siblings(batch, settings))[:, None]
        advantages_ENT = advantages_ENT * batch.live_ENT
    else:
        live_ENT = critics.targeted(batch)
        following = values if critics.kind == "V" else nn.functional.pad(values, (0, 1))
        targets_ENT = advantages.lambda_returns(rewards_ENT, following, live_ENT, gamma=gamma, lam=settings.critic_lam)
        if critics.kind == "V":
            advantages_ENT = advantages.td_lambda(rewards_ENT, values, live_ENT, gamma=gamma, lam=settings.lam)
            if critics.without:
                returns_ENT = advantages.lambda_returns(rewards_ENT, values, live_ENT, gamma=gamma, lam=settings.lam)
                baselines_ENT = critics.baselines(batch, values, returns_ENT)
                advantages_ENT = advantages.difference(returns_ENT, baselines_ENT, batch.live_ENT)
        else:
            advantages_ENT = from_alternatives(batch, values, critics, metrics)
        advantages_ENT = advantages_ENT * batch.live_ENT
        _annotate_values(batch, values, rewards_ENT, critics, gamma)
    if settings.normalize == "agent":
        recentre = settings.critic != "none"
        parts = [
            advantages.normalize(advantages_ENT[:, n], batch.live_ENT[:, n], recentre=recentre)
            for n in range(len(batch.agents))
        ]
        advantages_ENT = torch.stack(parts, 1)
    for n, agent in enumerate(batch.agents):
        chosen = advantages_ENT[:, n][batch.live_ENT[:, n].bool()]
        metrics[f"{agent}/advantage_deviation"] = chosen.std(correction=0).item() if len(chosen) else 0.0
    for e, t, agent, n in _answers(batch):
        batch.episodes[e].turns[t].advantages[agent] = advantages_ENT[e, n, t].item()
    return advantages_ENT, targets_ENT


def from_siblings(batch: Batch, settings: AlgorithmSettings) -> Tensor:
    """(E, T) of whole episodes: return-to-go at turn t against the siblings' at t, an ended sibling counting 0.

    An episode whose siblings all failed has nothing to be compared with and teaches nothing.
    """
    estimator = GROUP_ESTIMATORS[settings.advantage]
    returns_ET = advantages.discounted_returns(batch.rewards_ET, gamma=settings.gamma)
    parts = []
    for returns_GT in returns_ET.split([len(group.episodes) for group in batch.groups]):
        compared_GT = estimator(returns_GT)
        parts.append(advantages.group_std(compared_GT, returns_GT) if settings.normalize == "group" else compared_GT)
    return torch.cat(parts)


def from_tree(batch: Batch, settings: AlgorithmSettings) -> Tensor:
    """(E, T) of turn trees: each joint action against its siblings at the node."""
    estimator = GROUP_ESTIMATORS[settings.advantage]
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


def from_alternatives(batch: Batch, values_ENT: Tensor, critics: Critics, metrics: Metrics) -> Tensor:
    """(E, N, T): Q of what was taken minus the mean Q of each agent's alternatives, team-mates' answers fixed."""
    advantages_S = torch.zeros(values_ENT.numel())
    for slot_M, q_MK in critics.alternatives(batch, metrics):
        advantages_S[slot_M] = advantages.counterfactual(values_ENT.flatten()[slot_M], q_MK)
    return advantages_S.view(values_ENT.shape)


def _annotate_values(batch: Batch, values: Tensor, rewards_ENT: Tensor, critics: Critics, gamma: float) -> None:
    """Write values and TD errors into the episodes, so that a person can see who failed when."""
    for e, t, agent, n in _answers(batch):
        turn = batch.episodes[e].turns[t]
        turn.values[agent] = values[e, n, t].item()
        if critics.kind == "V":
            error = rewards_ENT[e, n, t] + gamma * values[e, n, t + 1] - values[e, n, t]
            turn.td_errors[agent] = error.item()


def _answers(batch: Batch) -> list[tuple[int, int, str, int]]:
    """(episode, turn, agent, agent's number) of every answer given."""
    return [(e, t, batch.agents[n], n) for e, n, t in batch.live_ENT.nonzero().tolist()]
