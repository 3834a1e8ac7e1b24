"""In-process generation, batched over episodes and agents.

This loop replaces `generate` of transformers for three reasons: log-probs under the sampling distribution, random numbers that
depend on the request and not on the batch, and rows that leave the batch when they have ended. Keys and values of a history are
reused in the next turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from collm.algorithms.logprobs import sample
from collm.engines.kv_cache import GrowingCache, Layers, Memory, attends_to_all, new_cache
from collm.models.policy import Policy, compute_in
from collm.models.team import Team
from collm.types import Completion, Ids, Request, Sampling


class LocalEngine:
    """Generates with the team's own weights, in this process.

    Args:
        batch_tokens: maximum prompt and answer tokens in one batch, which bounds the memory of the key-value cache.
        remember: keep keys and values of the last answers, until `load` or `rest`, for prompts that continue them. The kept
            cache is limited to half of `batch_tokens`; larger calls are not cached.
    """

    trains = True

    def __init__(self, team: Team, *, batch_tokens: int = 1 << 17, remember: bool = False):
        self.team = team
        self.batch_tokens = batch_tokens
        self.remember = remember
        self.watch: Callable[[int, int], None] | None = None
        """Called after each batch of a call with the number of answers that are done, and of those asked for."""
        self._memories: dict[tuple[int, Sampling], Memory] = {}
        self._ready: dict[int, Policy] = {}

    def load(self, team: Team) -> None:
        self.rest()
        self.team = team

    def rest(self) -> None:
        """Release the kept caches and cast weights."""
        self._memories.clear()
        self._ready.clear()

    def close(self) -> None:
        self.rest()

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        completions: dict[int, Completion] = {}
        distinct = list({id(policy): None for policy in self.team.policies.values()})
        places = {
            agent: distinct.index(id(policy)) for agent, policy in self.team.policies.items()
        }  # the same in every process
        order = sorted(range(len(requests)), key=lambda i: (places[requests[i].agent], repr(requests[i].sampling), i))
        for _, members in groupby(order, key=lambda i: (places[requests[i].agent], requests[i].sampling)):
            rows = list(members)
            policy, sampling = self.team.policies[requests[rows[0]].agent], requests[rows[0]].sampling
            prompts = {i: policy.chat.encode(requests[i].messages) for i in rows}
            for i in rows:
                if len(prompts[i]) + sampling.max_tokens > policy.max_positions:
                    completions[i] = _too_long(requests[i], len(prompts[i]), policy.max_positions)
            rows = sorted((i for i in rows if i not in completions), key=lambda i: -len(prompts[i]))
            before = self._memories.pop((id(policy), sampling), None)
            held = sum(memory.tokens for memory in self._memories.values())
            size = sum(len(prompts[i]) + sampling.max_tokens for i in rows)
            after = Memory() if self.remember and _continues(policy) and held + size <= self.batch_tokens // 2 else None
            if after is None:
                before = None
            if id(policy) not in self._ready:
                self._ready[id(policy)] = policy.for_generation()
            while rows:
                count = max(1, (self.batch_tokens - held) // (len(prompts[rows[0]]) + sampling.max_tokens))
                batch, rows = rows[:count], rows[count:]
                uniforms = np.stack([uniforms_of(requests[i].seed, sampling.max_tokens) for i in batch])
                answers = decode(
                    self._ready[id(policy)], [prompts[i] for i in batch], torch.from_numpy(uniforms), sampling, before, after
                )
                for i, (ids, logprobs) in zip(batch, answers, strict=True):
                    stopped = bool(len(ids)) and int(ids[-1]) in policy.stop_ids
                    text, written = policy.chat.read(ids.tolist())
                    finish: Literal["stop", "length"] = "stop" if stopped else "length"
                    completions[i] = Completion(requests[i].agent, text, prompts[i], ids, logprobs, finish, written=written)
                if self.watch is not None:
                    self.watch(len(completions), len(requests))
            if after is not None:
                self._memories[id(policy), sampling] = after
        return [completions[i] for i in range(len(requests))]


def _continues(policy: Policy) -> bool:
    """Whether a prompt can continue an earlier one and reuse its keys and values."""
    config = policy.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    turns_with_length = rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope")  # keys depend on the text's length
    return policy.chat.grows and attends_to_all(policy) and not turns_with_length


def _too_long(request: Request, length: int, limit: int) -> Completion:
    reason = (
        f"a history of {length} tokens and an answer of up to {request.sampling.max_tokens} exceed the model's {limit} "
        "positions; lower rollout.max_tokens or env.turns, or set rollout.history='last'"
    )
    return Completion(request.agent, "", finish_reason="error", error=reason)


def uniforms_of(seed: int, length: int) -> np.ndarray:
    """The random numbers of one answer: (length,) float32 in [0, 1), a function of its seed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(length, dtype=np.float32)


def decode(
    policy: Policy,
    prompts: Sequence[Ids],
    uniforms_BT: Tensor,
    sampling: Sampling,
    before: Memory | None = None,
    after: Memory | None = None,
) -> list[tuple[Ids, np.ndarray]]:
    """Sample an answer to every prompt: a list of (ids (L,), log-probs (L,)), end-of-text included where sampled.

    Args:
        prompts: B arrays of token ids.
        uniforms_BT: (B, max_tokens) in [0, 1), the random number of each token.
        before: keys and values of an earlier call, for prompts that continue its answers; cleared afterwards.
        after: receives keys and values of this call; None to keep none.
    """
    device = policy.device
    num, longest = len(prompts), max(map(len, prompts))
    distinct = {prompt.tobytes(): prompt for prompt in prompts}  # siblings' equal first prompts are read once
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
    known = [None if before is None else before.find(prompt) for prompt in distinct.values()]
    num_new = longest  # columns at the right to read: equal for all rows, so that the batch is rectangular
    if any(known):
        assert isinstance(cache, GrowingCache)
        num_new = max(
            len(prompt) - (layers[0][0].shape[1] if layers else 0)
            for prompt, layers in zip(distinct.values(), known, strict=True)
        )
        if num_new < longest:
            cache.begin(known, [len(prompt) - num_new for prompt in distinct.values()], longest - num_new)
    if before is not None:
        before.clear()
    del known

    def read(ids_BL: Tensor, mask_BL: Tensor, positions_BL: Tensor) -> Tensor:
        """Hidden states (B, D) of the last of `ids_BL`, which are added to the cache."""
        with compute_in(policy.compute, device):
            output = policy.body(
                input_ids=ids_BL,
                attention_mask=mask_BL if padded else None,
                position_ids=positions_BL,
                past_key_values=cache,
                use_cache=True,
            )
        return output.last_hidden_state[:, -1]

    new = slice(longest - num_new, longest)
    hidden_BD = read(ids_UL[:, new].to(device), mask_UL[:, :longest], positions_UL[:, new])[spread_B]
    if len(distinct) < num:
        cache.batch_select_indices(spread_B)
    mask_BL, position_B = mask_UL[spread_B], positions_UL[spread_B, -1]
    tokens_BT = torch.zeros(num, sampling.max_tokens, dtype=torch.int64, device=device)
    logps_BT = torch.zeros(num, sampling.max_tokens, device=device)
    lengths_B = torch.full((num,), sampling.max_tokens, dtype=torch.int64, device=device)
    stops = torch.tensor(policy.stop_ids, device=device)
    rows_B = torch.arange(num, device=device)  # the request of each row of the shrinking batch
    live_B = torch.ones(num, dtype=torch.bool, device=device)
    kept: dict[int, Layers] = {}

    def keep(leaving: Tensor) -> None:
        """Copy keys and values of these rows: of the prompt and of the answer without its last token."""
        if after is not None:
            assert isinstance(cache, GrowingCache)
            requests = rows_B[leaving]
            for row, i, length in zip(leaving.tolist(), requests.tolist(), lengths_B[requests].tolist(), strict=True):
                kept[i] = cache.row(row, longest - len(prompts[i]), longest + length - 1)

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
            keep((~live_B).nonzero()[:, 0])
            staying = live_B.nonzero()[:, 0]
            cache.batch_select_indices(staying)
            rows_B, mask_BL, next_B, position_B = rows_B[staying], mask_BL[staying], next_B[staying], position_B[staying]
            live_B = live_B[staying]
        position_B = position_B + 1
        hidden_BD = read(next_B[:, None], mask_BL[:, : longest + step + 1], position_B[:, None])
    keep(torch.arange(len(rows_B), device=device))
    tokens, logps = tokens_BT.cpu().numpy().astype(np.int32), logps_BT.cpu().numpy()
    answers = [(tokens[i, :length].copy(), logps[i, :length].copy()) for i, length in enumerate(lengths_B.tolist())]
    for i, layers in kept.items():
        assert after is not None
        after.add(np.concatenate([prompts[i], answers[i][0]]), layers)
    return answers
