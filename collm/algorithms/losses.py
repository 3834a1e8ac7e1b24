"""Losses. Each returns (loss, stats); none reads settings or logs.

Answers of different lengths are concatenated: token k belongs to answer `answer_K[k]`, so no padding is masked.
A policy loss is a sum over the given answers, divided by `num_answers`, the number of answers of the whole update. The losses
of an update's micro-batches therefore add up to the loss of the whole update.
"""

from __future__ import annotations

import torch
from torch import Tensor

Stats = dict[str, float]


def answer_sums(values_K: Tensor, answer_K: Tensor, num: int) -> Tensor:
    """Sum of per-token values over each answer: (num,). values_K: (K,); answer_K: (K,) indices below `num`."""
    return values_K.new_zeros(num).index_add(0, answer_K, values_K)


def reinforce(logp_K: Tensor, answer_K: Tensor, advantages_S: Tensor, *, num_answers: int) -> tuple[Tensor, Stats]:
    """Policy gradient of whole answers.

        L = - 1/num_answers  sum_s A_s log pi(a_s | h_s),   log pi(a_s | h_s) = sum of its tokens' log-probs

    Args:
        logp_K: (K,) log-prob of each token under the present policy.
        answer_K: (K,) index of the answer that each token belongs to.
        advantages_S: (S,) advantage of each answer, without gradient.
        num_answers: answers of the whole update.
    Returns: scalar loss, no stats.
    Source: Williams 1992; with a TD error as A, arXiv:2601.21972.
    """
    logp_S = answer_sums(logp_K, answer_K, len(advantages_S))
    return -(advantages_S * logp_S).sum() / num_answers, {}


def ppo_clip(
    logp_K: Tensor, old_logp_K: Tensor, answer_K: Tensor, advantages_S: Tensor, *, clip: float, num_answers: int
) -> tuple[Tensor, Stats]:
    """Ratio-clipped loss with one ratio per token.

        rho_k = exp(logp_k - old_logp_k)
        L = - 1/num_answers  sum_k min(rho_k A, clamp(rho_k, 1 - clip, 1 + clip) A)

    At rho = 1 its gradient is that of `reinforce`.

    Args: as in `reinforce`; old_logp_K: (K,) log-probs recorded when sampling.
    Returns: scalar loss; stats "clipped": number of tokens whose ratio is clipped.
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
    """Ratio-clipped loss with one ratio per answer, the geometric mean of its tokens' ratios.

        rho_s = exp( mean over tokens of (logp - old_logp) )
        L = - 1/num_answers  sum_s length_s * min(rho_s A_s, clamp(rho_s, 1 - clip, 1 + clip) A_s)

    The factor length_s makes the gradient at rho = 1 that of `reinforce`.

    Args: as in `ppo_clip`. Returns: scalar loss; stats "clipped": number of tokens in answers whose ratio is clipped.
    Source: GSPO, arXiv:2507.18071, eq. 5 and 7.
    """
    num = len(advantages_S)
    length_S = answer_sums(torch.ones_like(logp_K), answer_K, num).clamp_min(1)
    ratio_S = torch.exp(answer_sums(logp_K - old_logp_K, answer_K, num) / length_S)
    clipped_S = torch.clamp(ratio_S, 1 - clip, 1 + clip)
    gain_S = torch.minimum(ratio_S * advantages_S, clipped_S * advantages_S)
    outside = length_S[clipped_S * advantages_S < ratio_S * advantages_S].sum()
    return -(length_S * gain_S).sum() / num_answers, {"clipped": outside.item()}


def kl_to_reference(logp_K: Tensor, reference_logp_K: Tensor, *, num_answers: int) -> tuple[Tensor, Stats]:
    """KL(pi || reference) of each token's distribution, from samples of pi; value and gradient are each unbiased.

        d_k    = logp_k - reference_logp_k
        value    sum_k exp(-d_k) + d_k - 1  / num_answers      (k3, never negative)
        gradient sum_k d_k grad logp_k      / num_answers      (that of k2 = d_k^2 / 2)

    grad KL(pi || reference) = E_pi[d grad logp], since E_pi[grad logp] = 0. The gradient of k3 has the mean
    grad KL(reference || pi), so the gradient is taken from k2 and the value from k3.
    The sum is over tokens: each token's divergence given the tokens before it, without the effect of a token on later ones.
    Both are unbiased for tokens sampled from pi with its full support. In later passes over the same samples they estimate the
    quantities under the policy that sampled, since samples have no importance weight.

    Args: logp_K, reference_logp_K: (K,) log-probs of each token under policy and reference.
    Returns: scalar loss; stats "kl": sum of k3 over tokens, in nats.
    Source: Schulman 2020, "Approximating KL divergence" (k2, k3); GRPO 2402.03300, eq. 4, for the value.
    """
    difference_K = logp_K - reference_logp_K
    kl_K = (torch.exp(-difference_K) + difference_K - 1).detach()
    square_K = difference_K**2 / 2
    loss_K = kl_K + (square_K - square_K.detach())
    return loss_K.sum() / num_answers, {"kl": kl_K.sum().item()}


def value_error(values_S: Tensor, targets_S: Tensor, *, num_values: int) -> tuple[Tensor, Stats]:
    """Mean squared error of a critic.

        L = 1/num_values  sum_s (V_s - target_s)^2

    Args:
        values_S: (S,) in units of return.
        targets_S: (S,) in units of return; they carry no gradient.
        num_values: values of the whole update.
    Returns: scalar loss, no stats.
    """
    return ((values_S - targets_S.detach()) ** 2).sum() / num_values, {}


def gaussian_histogram(targets_S: Tensor, edges_B1: Tensor, *, deviation: float) -> Tensor:
    """Probabilities of bins for targets that are smoothed by a Gaussian, truncated to the bins' range (HL-Gauss).

        p_b = (F(e_{b+1}) - F(e_b)) / (F(e_B) - F(e_0)),   F: normal distribution function with mean target_s

    Args:
        targets_S: (S,) in units of return; those outside the range are taken to its nearest end.
        edges_B1: (B + 1,) edges of the bins, ascending.
        deviation: standard deviation of the Gaussian, in units of return; 0.75 of a bin's width in the source.
    Returns: (S, B); rows add up to 1.
    Source: Farebrother et al. 2024, arXiv:2403.03950, section 3.1; Imani & White 2018, arXiv:1806.04613.
    """
    inside_S1 = targets_S.double().clamp(edges_B1[0].item(), edges_B1[-1].item())[:, None]
    below_SB1 = torch.special.ndtr((edges_B1.to(inside_S1) - inside_S1) / deviation)
    return (below_SB1.diff(dim=1) / (below_SB1[:, -1:] - below_SB1[:, :1])).to(targets_S)


def histogram_error(logits_SB: Tensor, targets_SB: Tensor, *, num_values: int) -> tuple[Tensor, Stats]:
    """Cross-entropy of a critic that predicts a histogram of returns.

        L = - 1/num_values  sum_s sum_b p_sb log softmax(logits_s)_b

    Args:
        logits_SB: (S, B).
        targets_SB: (S, B) probabilities without gradient, such as those of `gaussian_histogram`.
        num_values: values of the whole update.
    Returns: scalar loss in nats, no stats.
    Source: as of `gaussian_histogram`.
    """
    return -(targets_SB.detach() * logits_SB.log_softmax(1)).sum() / num_values, {}
