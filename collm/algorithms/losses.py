"""Losses: each returns (loss, stats) and knows neither settings nor logging.

Answers of different lengths are laid end to end: token k belongs to answer `answer_K[k]`, so there is no padding to mask.
A policy loss is a sum over the answers given, divided by `num_answers`, the answers of the whole update: the parts of an
update that is split into micro-batches add up to the loss of the unsplit one.
"""

from __future__ import annotations

import torch
from torch import Tensor

Stats = dict[str, float]


def answer_sums(values_K: Tensor, answer_K: Tensor, num: int) -> Tensor:
    """Sum per-token values into their answers. values_K: (K,); answer_K: (K,) indices below `num`. Returns (num,)."""
    return values_K.new_zeros(num).index_add(0, answer_K, values_K)


def reinforce(logp_K: Tensor, answer_K: Tensor, advantages_S: Tensor, *, num_answers: int) -> tuple[Tensor, Stats]:
    """Policy gradient of whole answers.

        L = - 1/num_answers  sum_s A_s log pi(a_s | h_s),   log pi(a_s | h_s) = sum of its tokens' log-probs

    Args:
        logp_K: (K,) log-prob of each token under the policy now; answer_K: (K,) the answer each token belongs to.
        advantages_S: (S,) advantage of each answer, without gradient.
    Source: Williams 1992; with a TD error as A, arXiv:2601.21972.
    """
    logp_S = answer_sums(logp_K, answer_K, len(advantages_S))
    return -(advantages_S * logp_S).sum() / num_answers, {}


def ppo_clip(
    logp_K: Tensor, old_logp_K: Tensor, answer_K: Tensor, advantages_S: Tensor, *, clip: float, num_answers: int
) -> tuple[Tensor, Stats]:
    """Ratio-clipped loss, a ratio per token.

        rho_k = exp(logp_k - old_logp_k)
        L = - 1/num_answers  sum_k min(rho_k A, clamp(rho_k, 1 - clip, 1 + clip) A)

    At rho = 1 its gradient is that of `reinforce`. Shapes as there; old_logp_K: (K,) recorded when sampling.
    Source: PPO, arXiv:1707.06347, eq. 7.
    """
    ratio_K = torch.exp(logp_K - old_logp_K)
    advantages_K = advantages_S[answer_K]
    clipped_K = torch.clamp(ratio_K, 1 - clip, 1 + clip)
    loss = -torch.minimum(ratio_K * advantages_K, clipped_K * advantages_K).sum() / num_answers
    outside = (clipped_K * advantages_K < ratio_K * advantages_K).float().sum()
    return loss, {"clipped": outside.item()}


def sequence_clip(
    logp_K: Tensor, old_logp_K: Tensor, answer_K: Tensor, advantages_S: Tensor, *, clip: float, num_answers: int
) -> tuple[Tensor, Stats]:
    """Ratio-clipped loss, one ratio per answer: the geometric mean of its tokens' ratios.

        rho_s = exp( mean over tokens of (logp - old_logp) )
        L = - 1/num_answers  sum_s length_s * min(rho_s A_s, clamp(rho_s, 1 - clip, 1 + clip) A_s)

    The length keeps the gradient at rho = 1 that of `reinforce`. Source: GSPO, arXiv:2507.18071, eq. 5 and 7.
    """
    num = len(advantages_S)
    length_S = answer_sums(torch.ones_like(logp_K), answer_K, num).clamp_min(1)
    ratio_S = torch.exp(answer_sums(logp_K - old_logp_K, answer_K, num) / length_S)
    clipped_S = torch.clamp(ratio_S, 1 - clip, 1 + clip)
    gain_S = torch.minimum(ratio_S * advantages_S, clipped_S * advantages_S)
    outside = length_S[clipped_S * advantages_S < ratio_S * advantages_S].sum()
    return -(length_S * gain_S).sum() / num_answers, {"clipped": outside.item()}


def kl_to_reference(logp_K: Tensor, reference_logp_K: Tensor, *, num_answers: int) -> tuple[Tensor, Stats]:
    """KL(pi || reference) of each token's distribution, from samples of pi; value and gradient each have the right mean.

        d_k    = logp_k - reference_logp_k
        value    sum_k exp(-d_k) + d_k - 1  / num_answers      (k3, never negative)
        gradient sum_k d_k grad logp_k      / num_answers      (that of k2 = d_k^2 / 2)

    grad KL(pi || reference) = E_pi[d grad logp], since E_pi[grad logp] = 0. The gradient of k3 itself has the mean
    grad KL(reference || pi), hence the two estimators. The loss's value is that of k3.
    The sum runs over tokens: each token's divergence given the tokens before it, not the effect of a token on later ones.
    Both means are exact for tokens sampled from pi itself: on-policy, with all of its support. In later passes over the same
    samples they are those of the policy that sampled, as there is no importance weight.

    Source: Schulman 2020, "Approximating KL divergence" (k2, k3); GRPO 2402.03300, eq. 4, for the value.
    """
    difference_K = logp_K - reference_logp_K
    kl_K = (torch.exp(-difference_K) + difference_K - 1).detach()
    square_K = difference_K**2 / 2
    loss_K = kl_K + (square_K - square_K.detach())
    return loss_K.sum() / num_answers, {"kl": kl_K.sum().item()}


def value_error(values_S: Tensor, targets_S: Tensor, *, num_values: int) -> tuple[Tensor, Stats]:
    """Squared error of a critic: sum (V - target)^2 / num_values; the target carries no gradient. (S,) each."""
    return ((values_S - targets_S.detach()) ** 2).sum() / num_values, {}
