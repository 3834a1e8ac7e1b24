"""In-process generation, batched over episodes and agents.

The loop is written out, rather than left to `transformers`, for three things: log-probs under the sampling distribution, random
numbers that belong to the request and not to the batch, and rows that leave the batch when they are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from collm.algorithms.logprobs import sample
from collm.models.policy import Policy, compute_in
from collm.models.team import Team
from collm.types import Completion, Ids, Request, Sampling


class LocalEngine:
    """Generates with the team's own weights, in this process.

    batch_tokens: prompt and answer tokens held in one batch at most; it bounds the memory of the key-value cache.
    """

    trains = True

    def __init__(self, team: Team, *, batch_tokens: int = 1 << 17):
        self.team = team
        self.batch_tokens = batch_tokens

    def load(self, team: Team) -> None:
        self.team = team

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions: dict[int, Completion] = {}
        policies = {agent: id(policy) for agent, policy in self.team.policies.items()}
        order = sorted(range(len(requests)), key=lambda i: (policies[requests[i].agent], repr(requests[i].sampling), i))
        for _, members in groupby(order, key=lambda i: (policies[requests[i].agent], requests[i].sampling)):
            rows = list(members)
            policy, sampling = self.team.policies[requests[rows[0]].agent], requests[rows[0]].sampling
            prompts = {i: policy.chat.encode(requests[i].messages) for i in rows}
            for i in rows:
                if len(prompts[i]) + sampling.max_tokens > policy.max_positions:
                    completions[i] = _too_long(requests[i], len(prompts[i]), policy.max_positions)
            rows = sorted((i for i in rows if i not in completions), key=lambda i: -len(prompts[i]))
            while rows:
                count = max(1, self.batch_tokens // (len(prompts[rows[0]]) + sampling.max_tokens))
                batch, rows = rows[:count], rows[count:]
                uniforms = np.stack([_uniforms(requests[i].seed, sampling.max_tokens) for i in batch])
                answers = decode(policy, [prompts[i] for i in batch], torch.from_numpy(uniforms), sampling)
                for i, (ids, logprobs) in zip(batch, answers, strict=True):
                    stopped = bool(len(ids)) and int(ids[-1]) in policy.stop_ids
                    text = policy.chat.decode(ids.tolist())
                    completions[i] = Completion(
                        requests[i].agent, text, prompts[i], ids, logprobs, "stop" if stopped else "length"
                    )
        return [completions[i] for i in range(len(requests))]


def _too_long(request: Request, length: int, limit: int) -> Completion:
    reason = (
        f"a history of {length} tokens and an answer of up to {request.sampling.max_tokens} exceed the model's {limit} "
        "positions; lower rollout.max_tokens or env.turns, or set rollout.history='last'"
    )
    return Completion(request.agent, "", finish_reason="error", error=reason)


def _uniforms(seed: int, length: int) -> np.ndarray:
    """The random numbers of one answer: (length,) float32 in [0, 1), from its seed alone."""
    return np.random.Generator(np.random.Philox(key=seed)).random(length, dtype=np.float32)


def decode(policy: Policy, prompts: Sequence[Ids], uniforms_BT: Tensor, sampling: Sampling) -> list[tuple[Ids, np.ndarray]]:
    """Sample an answer to every prompt: a list of (ids (L,), log-probs (L,)), end-of-text included where sampled.

    Args: uniforms_BT: (B, max_tokens), the random number of each token of each answer.
    """
    device = policy.device
    num, longest = len(prompts), max(map(len, prompts))
    distinct = {prompt.tobytes(): prompt for prompt in prompts}  # a group's siblings begin with the same text: read it once
    rows = {key: row for row, key in enumerate(distinct)}
    ids_UL = torch.zeros(len(distinct), longest, dtype=torch.int64)
    mask_UL = torch.zeros(len(distinct), longest + sampling.max_tokens, dtype=torch.int64)
    for row, prompt in enumerate(distinct.values()):
        ids_UL[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_UL[row, longest - len(prompt) :] = 1
    padded = not bool(mask_UL.all())
    spread_B = torch.tensor([rows[prompt.tobytes()] for prompt in prompts], device=device)
    uniforms_BT, mask_UL = uniforms_BT.to(device), mask_UL.to(device)
    positions_UL = (mask_UL[:, :longest].cumsum(-1) - 1).clamp_min(0)
    cache = new_cache(policy, longest + sampling.max_tokens)

    def read(ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """Hidden states (B, D) after the last of `ids_BL`, which the cache then holds too."""
        with compute_in(policy.compute, device):
            output = policy.body(
                input_ids=ids_BL,
                attention_mask=mask_BL if padded else None,
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
            )
        return output.last_hidden_state[:, -1]

    hidden_BD = read(ids_UL.to(device), mask_UL[:, :longest], positions_UL)[spread_B]
    if len(distinct) < num:
        cache.batch_select_indices(spread_B)
    mask_BL, position_B = mask_UL[spread_B], positions_UL[spread_B, -1]
    tokens_BT = torch.zeros(num, sampling.max_tokens, dtype=torch.int64, device=device)
    logps_BT = torch.zeros(num, sampling.max_tokens, device=device)
    lengths_B = torch.full((num,), sampling.max_tokens, dtype=torch.int64, device=device)
    stops = torch.tensor(policy.stop_ids, device=device)
    rows_B = torch.arange(num, device=device)  # which request each row of the shrinking batch answers
    live_B = torch.ones(num, dtype=torch.bool, device=device)
    for step in range(sampling.max_tokens):
        logits_BV = policy.logits(hidden_BD).float()
        next_B, logp_B = sample(logits_BV, uniforms_BT[rows_B, step], **sampling.distribution())
        tokens_BT[rows_B, step] = next_B
        logps_BT[rows_B, step] = logp_B
        stopped_B = torch.isin(next_B, stops) & live_B
        lengths_B[rows_B[stopped_B]] = step + 1
        live_B = live_B & ~stopped_B
        num_live = int(live_B.sum())
        if num_live == 0 or step + 1 == sampling.max_tokens:
            break
        if num_live <= 0.8 * len(live_B):
            keep = live_B.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows_B, mask_BL, next_B, position_B = rows_B[keep], mask_BL[keep], next_B[keep], position_B[keep]
            live_B = live_B[keep]
        position_B = position_B + 1
        hidden_BD = read(next_B[:, None], mask_BL[:, : longest + step + 1], position_B[:, None])
    tokens, logps = tokens_BT.cpu().numpy().astype(np.int32), logps_BT.cpu().numpy()
    return [(tokens[i, :length].copy(), logps[i, :length].copy()) for i, length in enumerate(lengths_B.tolist())]


def new_cache(policy: Policy, length: int) -> DynamicCache:
    """A cache for `length` tokens; models with sliding windows or other special layers keep the kind they ask for."""
    config = policy.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    if set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None:
        return GrowingCache(length)
    return DynamicCache(config=config)


class _GrowingLayer(DynamicLayer):
    """Keys and values in a buffer of the final length: a new token is written in place, not concatenated."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.used = length, 0
        self.is_initialized = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            B, H, _, D = key_states.shape
            self.buffers = [states.new_empty(B, H, self.length, D) for states in (key_states, value_states)]
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        end = self.used + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.used = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.keys, self.values = (buffer[:, :, : self.used] for buffer in self.buffers)


class GrowingCache(DynamicCache):
    """A key-value cache that knows its final length."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_GrowingLayer(self.length))
        return self.layers[layer_idx].update(key_states, value_states)
