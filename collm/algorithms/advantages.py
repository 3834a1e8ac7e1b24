"""Advantage estimators: from rewards, and values of a critic, to the advantage of each answer.

Suffixes: E episodes, N agents, T turns, G siblings of one task or one node. Rewards are joint, so most tensors have no N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def discounted_returns(rewards_ET: Tensor, *, gamma: float) -> Tensor:
    """Return-to-go of each turn.

        R_t = r_t + gamma R_{t+1},   R_T = 0

    Args:
        rewards_ET: (..., T) reward received after turn t; 0 after the end of an episode.
    Returns: (..., T), in units of reward.
    """
    returns = torch.zeros_like(rewards_ET)
    following = torch.zeros_like(rewards_ET[..., 0])
    for t in reversed(range(rewards_ET.shape[-1])):
        following = rewards_ET[..., t] + gamma * following
        returns[..., t] = following
    return returns


def td_lambda(rewards_ENT: Tensor, values_ENT1: Tensor, live_ENT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Advantage of each turn under TD(lambda), also known as GAE.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lam A_{t+1}

    `lam=0` is the TD error (CoLLM's choice); `lam=1` is the discounted return minus V.

    Args:
        rewards_ENT: (..., T) reward received after turn t.
        values_ENT1: (..., T+1) V before turn t, in units of return. The entry after the last live turn is 0 if the episode
            terminated, V of the final history if it was cut off.
        live_ENT: (..., T) 1 where the agent acted, 0 after its episode ended.
    Returns: (..., T), 0 where not live.
    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; with lam=0, arXiv:2601.21972.
    """
    advantages = torch.zeros_like(rewards_ENT)
    following = torch.zeros_like(rewards_ENT[..., 0])
    for t in reversed(range(rewards_ENT.shape[-1])):
        delta = rewards_ENT[..., t] + gamma * values_ENT1[..., t + 1] - values_ENT1[..., t]
        following = (delta + gamma * lam * following) * live_ENT[..., t]
        advantages[..., t] = following
    return advantages


def lambda_returns(rewards_ENT: Tensor, values_ENT1: Tensor, live_ENT: Tensor, *, gamma: float, lam: float) -> Tensor:
    """The critic's target: G_t = A_t + V_t with A from `td_lambda`.

    `lam=0` is the one-step target r_t + gamma V_{t+1}; `lam=1` is the return.

    Args: as in `td_lambda`.
    Returns: (..., T), in units of return; 0 where not live.
    """
    advantages = td_lambda(rewards_ENT, values_ENT1, live_ENT, gamma=gamma, lam=lam)
    return (advantages + values_ENT1[..., :-1]) * live_ENT


def group_mean(returns_G: Tensor) -> Tensor:
    """Return minus the group's mean.

        A_g = R_g - mean(R)

    Args: returns_G: (G, ...) with siblings along the first dimension. Returns: the same shape.
    Source: GRPO, arXiv:2402.03300; MAGRPO, arXiv:2508.04652.
    """
    mean = returns_G.double().mean(0, keepdim=True)  # exact where all returns are the same
    return (returns_G - mean).to(returns_G)


def leave_one_out(returns_G: Tensor) -> Tensor:
    """Return minus the mean of the other siblings.

        A_g = R_g - mean_{j != g} R_j = (R_g - mean(R)) G / (G - 1)

    A group of one gets 0. Args and returns as in `group_mean`. Source: RLOO, arXiv:2402.14740.
    """
    size = returns_G.shape[0]
    return group_mean(returns_G) * (size / max(1, size - 1))


def group_max(returns_G: Tensor) -> Tensor:
    """Return minus the group's maximum.

        A_g = R_g - max(R)

    The baseline depends on R_g, so the gradient is biased: the best sibling gets 0 and every other a negative advantage.
    Args and returns as in `group_mean`. Source: after ReMax, arXiv:2310.10505, whose baseline is a greedy answer's return.
    """
    return returns_G - returns_G.amax(0, keepdim=True)


def no_baseline(returns_G: Tensor) -> Tensor:
    """The return itself.

        A_g = R_g

    Unbiased, with the largest variance of the group estimators. Source: REINFORCE, Williams 1992.
    """
    return returns_G.clone()


GroupEstimator = Callable[[Tensor], Tensor]


def tree_returns(
    rewards: Sequence[Sequence[float]], paths: Sequence[tuple[int, ...]], *, gamma: float
) -> dict[tuple[int, ...], float]:
    """Return of every joint action of a turn tree.

        R(node) = r(node) + gamma * mean of R over the node's children

    A node is identified by its path, the child taken at each turn: a joint action at turn t has a path of length t + 1.

    Args:
        rewards: for each leaf episode, the reward of each of its turns.
        paths: for each leaf episode, the child taken at each turn; leaves share the paths of their common turns.
    Returns: path -> return, in units of reward.
    Source: MAGRPO, arXiv:2508.04652.

    Example: two leaves (0, 0) and (0, 1) with rewards [1, 2] and [1, 4], gamma 0.5 -> R(0,) = 1 + 0.5 * 3 = 2.5.
    """
    reward_at = {path[: t + 1]: r for rs, path in zip(rewards, paths, strict=True) for t, r in enumerate(rs)}
    children: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for node in reward_at:
        children.setdefault(node[:-1], []).append(node)
    returns: dict[tuple[int, ...], float] = {}
    for node in sorted(reward_at, key=len, reverse=True):
        below = [returns[child] for child in children.get(node, ())]
        returns[node] = reward_at[node] + (gamma * sum(below) / len(below) if below else 0.0)
    return returns


def tree_advantages(
    returns: dict[tuple[int, ...], float], estimator: GroupEstimator, *, by_deviation: bool = False
) -> dict[tuple[int, ...], float]:
    """Advantage of every joint action of a turn tree among the siblings at its node; `by_deviation` applies `group_std`.

    Args: returns: path -> return, from `tree_returns`. Returns: path -> advantage.
    """
    siblings: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for node in returns:
        siblings.setdefault(node[:-1], []).append(node)
    advantages: dict[tuple[int, ...], float] = {}
    for nodes in siblings.values():
        returns_G = torch.tensor([returns[node] for node in nodes], dtype=torch.float64)
        values = estimator(returns_G)
        if by_deviation:
            values = group_std(values, returns_G)
        advantages.update(zip(nodes, values.tolist(), strict=True))
    return advantages


def counterfactual(q_taken: Tensor, q_alternatives_K: Tensor) -> Tensor:
    """Advantage of one agent's answer with its team-mates' answers held fixed.

        A_i = Q(h, a) - mean_k Q(h, (a_-i, a_i^k)),   a_i^k ~ pi_i(. | h_i), the taken answer excluded

    Args:
        q_taken: (...) Q of the joint action taken, in units of return.
        q_alternatives_K: (..., K) Q with agent i's answer resampled K times.
    Returns: (...).
    Source: COMA, arXiv:1705.08926, eq. 4, with the expectation replaced by K samples.
    """
    return q_taken - q_alternatives_K.mean(-1)


def difference(returns_ENT: Tensor, baselines_ENT: Tensor, live_ENT: Tensor) -> Tensor:
    """Return minus a difference baseline, which depends on the team-mates' answers of the turn and not on the agent's own.

        A_i,t = G_t - b_i(h_t, a_-i,t)

    Given the histories, a_i is independent of a_-i, so the policy gradient of agent i stays unbiased. The effect of the
    team-mates' answers is in G and in b, and cancels. If G is the one-step target r + gamma V, this is a difference reward in
    units of value.

    Args:
        returns_ENT: (E, N, T) G, the one-step target or a lambda-return, in units of return.
        baselines_ENT: (E, N, T) b, in units of return.
        live_ENT: (E, N, T) 1 where the agent acted.
    Returns: (E, N, T), 0 where not live.
    Source: Wu et al. 2018, arXiv:1803.07246, section 4 (baselines that read other actions); Wolpert & Tumer 2001 (difference
        rewards, the agent's action replaced by a no-op).
    """
    return (returns_ENT - baselines_ENT) * live_ENT


def normalize(advantages: Tensor, live: Tensor, *, recentre: bool, eps: float = 1e-6) -> Tensor:
    """Divide one agent's advantages by their standard deviation over an iteration; `recentre` subtracts the mean first.

        A' = (A - mean(A)) / std(A)   or   A / std(A)

    Recentring is for critics. It would make the four group methods equal, since they differ only in their baseline.
    The deviation is around the mean in both cases, without Bessel's correction. If it is at most `eps`, nothing is divided.

    Args:
        advantages: (E, T) of one agent, in units of return.
        live: (E, T) 1 where the agent acted; the other entries are neither counted nor changed.
    Returns: (E, T), without unit.
    """
    chosen = advantages[live.bool()].double()
    if chosen.numel() < 2:
        return advantages
    deviation = chosen.std(correction=0)
    scale = deviation if deviation > eps else torch.ones_like(deviation)
    centre = chosen.mean() if recentre else torch.zeros_like(deviation)
    return torch.where(live.bool(), (advantages - centre) / scale, advantages).to(advantages)


def group_std(advantages_G: Tensor, returns_G: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide a group's advantages by the standard deviation of its returns; meaningful for G >= 4.

        A'_g = A_g / std(R)

    This is the population deviation: squares are divided by G. TRL and verl use the sample deviation (G - 1), so their
    advantages are smaller by the factor sqrt((G - 1) / G): 0.87 at G = 4.
    A group whose returns are equal, up to rounding, keeps its advantages undivided.

    Args: advantages_G, returns_G: (G, ...) with siblings along the first dimension. Returns: the same shape.
    Source: GRPO, arXiv:2402.03300.
    """
    deviation = returns_G.double().std(0, keepdim=True, correction=0)
    size = returns_G.double().abs().amax(0, keepdim=True).clamp_min(1)
    return (advantages_G / torch.where(deviation > eps * size, deviation, torch.ones_like(deviation))).to(advantages_G)
