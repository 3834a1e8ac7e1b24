"""Log-probabilities under the sampling distribution: temperature, top-k and top-p applied."""

from __future__ import annotations

import torch
from torch import Tensor


def support(logits_KV: Tensor, *, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """The tokens that can be sampled: candidates (K, C) int64, ids in rising order, and which of them are kept, (K, C) bool.

    Top-k is applied first, then top-p: the smallest set whose probability, renormalized after top-k, reaches `top_p`. Ties go
    to the lower id. The likeliest token is always kept. Only the candidates are sorted, a few of the vocabulary's V tokens
    where logits are peaked: the k likeliest with their ties, or tokens that are likelier than the rest and reach `top_p`.

    Args: logits_KV: (K, V), already divided by the temperature.
    """
    if limited := 0 < top_k < logits_KV.shape[-1]:
        ids_KC, real_KC = _columns(logits_KV >= logits_KV.topk(top_k).values[:, -1:])
        probs_KC = logits_KV
    else:
        ids_KC, real_KC, probs_KC = _likely(torch.softmax(logits_KV, dim=-1), top_p)
    values_KC = logits_KV.gather(-1, ids_KC).masked_fill(~real_KC, float("-inf"))
    sorted_KC, order_KC = torch.sort(values_KC, dim=-1, descending=True, stable=True)
    if limited:
        order_KC = order_KC[:, :top_k]
        probs_KC = torch.softmax(sorted_KC[:, :top_k], dim=-1)
    else:
        probs_KC = probs_KC.gather(-1, order_KC)
    kept_KC = (torch.cumsum(probs_KC, dim=-1) - probs_KC < top_p) | (top_p >= 1)
    kept_KC[:, :1] = True
    return ids_KC, torch.zeros_like(real_KC).scatter(-1, order_KC, kept_KC) & real_KC


def _likely(probs_KV: Tensor, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates for top-p: ids (K, C), which of them are no padding, and their probabilities.

    Tokens below (1 - P) / V sum to less than 1 - P, so that the others reach P. If they are few, a higher bound with this
    property is found by bisection. P is a little above `top_p`, so that rounding excludes no token.
    """
    reached = top_p + (1 - top_p) / 16
    low_K1 = torch.full_like(probs_KV[:, :1], (1 - reached) / probs_KV.shape[-1])
    ids_KC, real_KC = _columns(probs_KV >= low_K1)
    if ids_KC.shape == probs_KV.shape:
        return ids_KC, real_KC, probs_KV
    probs_KC = probs_KV.gather(-1, ids_KC) * real_KC
    high_K1 = torch.ones_like(low_K1)
    for _ in range(8):
        middle_K1 = (low_K1 * high_K1).sqrt()
        enough_K1 = (probs_KC * (probs_KC >= middle_K1)).sum(-1, keepdim=True) >= reached
        low_K1, high_K1 = torch.where(enough_K1, middle_K1, low_K1), torch.where(enough_K1, high_K1, middle_K1)
    columns_KC, real_KC = _columns(real_KC & (probs_KC >= low_K1))
    return ids_KC.gather(-1, columns_KC), real_KC, probs_KC.gather(-1, columns_KC)


def _columns(chosen_KV: Tensor) -> tuple[Tensor, Tensor]:
    """The columns (K, C) that are chosen in each row, in rising order, and which of them are no padding.

    Where a row has more than half of the columns, the answer is all columns and `chosen_KV`, which costs less.
    """
    V = chosen_KV.shape[-1]
    counts_K = chosen_KV.sum(-1, dtype=torch.int32)
    widest = max(counts_K.tolist(), default=0)
    if widest > V // 2:
        return torch.arange(V, device=counts_K.device).expand_as(chosen_KV), chosen_KV
    real_KC = torch.arange(widest, device=counts_K.device) < counts_K[:, None]
    return torch.zeros_like(real_KC, dtype=torch.int64).masked_scatter(real_KC, chosen_KV.nonzero()[:, 1]), real_KC


def _scaled(logits_KV: Tensor, temperature: float) -> Tensor:
    """Logits divided by the temperature, in float32 or wider. Log-probs of greedy answers are those at temperature 1."""
    scaled_KV = logits_KV.float() if logits_KV.dtype in (torch.bfloat16, torch.float16) else logits_KV
    return scaled_KV if temperature in (0, 1) else scaled_KV / temperature


def _whole(temperature: float, top_p: float, top_k: int) -> bool:
    """Whether every token can be sampled."""
    return temperature == 0 or (not top_k and top_p >= 1)


def token_logprobs(logits_KV: Tensor, tokens_K: Tensor, *, temperature: float, top_p: float, top_k: int) -> Tensor:
    """Log-probs of given tokens under the sampling distribution.

        log pi(k) = z_k / temperature - log sum_{j in support} exp(z_j / temperature)

    The given tokens are always in the support, so that rounding cannot exclude them.

    Args: logits_KV: (K, V); tokens_K: (K,) int64. Returns: (K,), float32 or wider.
    """
    scaled_KV = _scaled(logits_KV, temperature)
    if _whole(temperature, top_p, top_k):
        return scaled_KV.gather(-1, tokens_K[:, None])[:, 0] - torch.logsumexp(scaled_KV, dim=-1)
    with torch.no_grad():
        ids_KC, kept_KC = support(scaled_KV, top_p=top_p, top_k=top_k)
        ids_KC = torch.cat([tokens_K[:, None], ids_KC], dim=-1)
        kept_KC = torch.cat([torch.ones_like(kept_KC[:, :1]), kept_KC & (ids_KC[:, 1:] != tokens_K[:, None])], dim=-1)
    chosen_KC = scaled_KV.gather(-1, ids_KC)
    return chosen_KC[:, 0] - torch.logsumexp(chosen_KC.masked_fill(~kept_KC, float("-inf")), dim=-1)


def distribution(logits_KV: Tensor, *, temperature: float, top_p: float, top_k: int) -> tuple[Tensor | None, Tensor]:
    """The sampling distribution: token ids (K, C) in rising order, None for all V tokens, and their log-probs (K, C).

    Log-probs are -inf outside the support. At temperature 0 they are those at temperature 1.

    Args: logits_KV: (K, V).
    """
    scaled_KC, ids_KC = _scaled(logits_KV, temperature), None
    if not _whole(temperature, top_p, top_k):
        ids_KC, kept_KC = support(scaled_KC, top_p=top_p, top_k=top_k)
        scaled_KC = scaled_KC.gather(-1, ids_KC).masked_fill(~kept_KC, float("-inf"))
    return ids_KC, torch.log_softmax(scaled_KC, dim=-1)


def likeliest(logits_V: Tensor, count: int, *, temperature: float, top_p: float, top_k: int) -> list[tuple[int, float]]:
    """The likeliest tokens of the sampling distribution, at most `count`, with their log-probs; none outside the support.

    Args: logits_V: (V,) of one position.
    """
    ids_KC, logps_KC = distribution(logits_V[None], temperature=temperature, top_p=top_p, top_k=top_k)
    values, columns = logps_KC[0].topk(min(count, logps_KC.shape[-1]))
    ids = columns if ids_KC is None else ids_KC[0, columns]
    return [(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True) if value > float("-inf")]


def sample(logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at a given uniform number.

    The draw is a function of that number, so a row's answer does not depend on the other rows of its batch. At temperature 0
    it is the likeliest token.

    Args: logits_BV: (B, V); uniforms_B: (B,) in [0, 1). Returns: tokens (B,) int64 and their log-probs (B,).
    """
    ids_BC, logp_BC = distribution(logits_BV, temperature=temperature, top_p=top_p, top_k=top_k)
    if temperature == 0:
        columns_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        cumulative_BC = torch.cumsum(logp_BC.exp(), dim=-1)
        total_B1 = cumulative_BC[:, -1:]
        below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
        points_B1 = torch.minimum(uniforms_B[:, None].to(total_B1) * total_B1, below_B1)
        columns_B1 = torch.searchsorted(cumulative_BC, points_B1, right=True)
    tokens_B1 = columns_B1 if ids_BC is None else ids_BC.gather(-1, columns_B1)
    return tokens_B1[:, 0], logp_BC.gather(-1, columns_B1)[:, 0]
