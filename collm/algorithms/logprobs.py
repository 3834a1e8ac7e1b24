"""Log-probabilities under the sampling distribution: temperature, top-k and top-p applied."""

from __future__ import annotations

import torch
from torch import Tensor


def support(logits_KV: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """The tokens that can be sampled: (K, V) bool, True for kept.

    Top-k is applied first, then top-p: the smallest set whose probability, renormalized after top-k, reaches `top_p`. Ties go
    to the lower id. The likeliest token is always kept.

    Args: logits_KV: (K, V), already divided by the temperature.
    """
    V = logits_KV.shape[-1]
    limit = min(top_k, V) if top_k else V
    sorted_KL, order_KL = torch.sort(logits_KV, dim=-1, descending=True, stable=True)
    sorted_KL, order_KL = sorted_KL[..., :limit], order_KL[..., :limit]
    if top_p < 1:
        probs_KL = torch.softmax(sorted_KL, dim=-1)
        before_KL = torch.cumsum(probs_KL, dim=-1) - probs_KL
        kept_KL = before_KL < top_p
        kept_KL[..., 0] = True
    else:
        kept_KL = torch.ones_like(sorted_KL, dtype=torch.bool)
    return torch.zeros_like(logits_KV, dtype=torch.bool).scatter(-1, order_KL, kept_KL)


def restrict(logits_KV: Tensor, tokens_K: Tensor | None = None, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Logits (K, V) of the sampling distribution: divided by the temperature, minus infinity outside the support.

    At temperature 0 sampling is greedy, and log-probs are those at temperature 1.

    Args: logits_KV: (K, V). tokens_K: (K,) sampled tokens, which are always kept, so that rounding cannot exclude them.
    """
    scaled_KV = logits_KV.float() if logits_KV.dtype in (torch.bfloat16, torch.float16) else logits_KV
    if temperature not in (0, 1):
        scaled_KV = scaled_KV / temperature
    if temperature == 0 or (not top_k and top_p >= 1):
        return scaled_KV
    with torch.no_grad():
        kept_KV = support(scaled_KV, top_p=top_p, top_k=top_k)
        if tokens_K is not None:
            kept_KV.scatter_(-1, tokens_K[..., None], True)
    return scaled_KV.masked_fill(~kept_KV, float("-inf"))


def token_logprobs(logits_KV: Tensor, tokens_K: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probs of given tokens under the sampling distribution.

        log pi(k) = z_k / temperature - log sum_{j in support} exp(z_j / temperature)

    Args: logits_KV: (K, V); tokens_K: (K,) int64. Returns: (K,), float32 or wider.
    """
    restricted_KV = restrict(logits_KV, tokens_K, temperature=temperature, top_p=top_p, top_k=top_k)
    chosen_K = restricted_KV.gather(-1, tokens_K[:, None])[:, 0]
    return chosen_K - torch.logsumexp(restricted_KV, dim=-1)


def sample(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform number.

    The draw is a function of that number, so a row's answer does not depend on the other rows of its batch.

    Args: logits_BV: (B, V); uniforms_B: (B,) in [0, 1). Returns: tokens (B,) int64 and their log-probs (B,).
    """
    restricted_BV = restrict(logits_BV, temperature=temperature, top_p=top_p, top_k=top_k)
    logp_BV = torch.log_softmax(restricted_BV, dim=-1)
    if temperature == 0:
        tokens_B = logits_BV.argmax(-1)
    else:
        cumulative_BV = torch.cumsum(logp_BV.exp(), dim=-1)
        total_B1 = cumulative_BV[:, -1:]
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        points_B1 = torch.minimum(uniforms_B[:, None].to(total_B1) * total_B1, below_B1)
        tokens_B = torch.searchsorted(cumulative_BV, points_B1, right=True)[:, 0]
    return tokens_B, logp_BV.gather(-1, tokens_B[:, None])[:, 0]
