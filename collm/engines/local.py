"""In-process generation, batched over episodes and agents.

This loop replaces `generate` of transformers for three reasons: log-probs under the sampling distribution, random numbers that
depend on the request and not on the batch, and rows that leave the batch when they have ended. Keys and values of a history are
reused in the next turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from collm.algorithms.logprobs import sample
from collm.engines.kv_cache import GrowingCache, Layers, Memory, attends_to_all, joined, new_cache
from collm.models.adapters import Stack, compute_in
from collm.models.policy import Policy
from collm.models.sharing import num_shared
from collm.models.team import Team
from collm.types import Completion, Ids, Request, Sampling

BEGINNING = 64
"""Fewest tokens for which the common beginning of prompts is read in a pass of its own."""

Observer = Callable[[int, float, Tensor], bool]
"""Called with each sampled token of one answer, its log-prob, and the logits (V,) that it was drawn from; the answer ends with
this token if the call returns true."""


class LocalEngine:
    """Generates with the team's own weights, in this process.

    Args:
        batch_tokens: maximum prompt and answer tokens in one batch, which bounds the memory of the key-value cache.
        remember: keep keys and values of the last answers, until `load` or `rest`, for prompts that continue them. The kept
            cache of each whole model, and of all adapters of one base, is limited to half of `batch_tokens`; larger calls are
            not cached. What one of them keeps does not depend on the others, which may be in other processes.
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

    def generate(self, requests: Sequence[Request], observers: Sequence[Observer | None] = ()) -> list[Completion]:
        """As `Engine.generate`. observers: one per request, or None for a request that has none."""
        split = any(policy.split for policy in self.team.policies.values())  # its buffers are also those of an update
        with torch.no_grad() if split else torch.inference_mode():
            return self._generate(requests, observers)

    def _generate(self, requests: Sequence[Request], observers: Sequence[Observer | None]) -> list[Completion]:
        completions: dict[int, Completion] = {}
        policies = [self.team.policies[request.agent] for request in requests]
        distinct = list({id(policy): policy for policy in self.team.policies.values()}.values())
        places = {id(policy): place for place, policy in enumerate(distinct)}  # the same in every process
        homes = {id(one): [_one_batch(one, other) for other in distinct].index(True) for one in distinct}
        keys = [(id(policy), request.sampling) for policy, request in zip(policies, requests, strict=True)]

        def segment(i: int) -> tuple[int, str]:
            return places[id(policies[i])], repr(requests[i].sampling)

        def batch_of(i: int) -> tuple[int, str]:
            return homes[id(policies[i])], "" if _mixes(policies[i]) else repr(requests[i].sampling)

        order = sorted(range(len(requests)), key=lambda i: (batch_of(i), segment(i)))
        for (home, _), members in groupby(order, key=batch_of):
            rows = list(members)
            prompts = {i: policies[i].chat.encode(requests[i].messages) for i in rows}
            for i in rows:
                if len(prompts[i]) + requests[i].sampling.max_tokens > policies[i].max_positions:
                    completions[i] = _too_long(requests[i], len(prompts[i]), policies[i].max_positions)
            rows = [i for i in rows if i not in completions]
            sizes: Counter[tuple[int, Sampling]] = Counter()
            for i in rows:
                sizes[keys[i]] += len(prompts[i]) + requests[i].sampling.max_tokens
                if id(policies[i]) not in self._ready:
                    self._ready[id(policies[i])] = policies[i].for_generation()
            before = {key: self._memories.pop(key, None) for key in sizes}
            held = sum(memory.tokens for (owner, _), memory in self._memories.items() if homes[owner] == home)
            after: dict[tuple[int, Sampling], Memory] = {}
            room = self.batch_tokens // 2 - held
            for key, size in sizes.items():
                if self.remember and _continues(self._ready[key[0]]) and size <= room:
                    after[key], room = Memory(), room - size
            before = {key: memory for key, memory in before.items() if key in after}
            rows.sort(key=lambda i: -len(prompts[i]))
            while rows:
                longest = len(prompts[rows[0]]) + max(requests[i].sampling.max_tokens for i in rows)
                count = max(1, (self.batch_tokens - held) // longest)
                batch, rows = sorted(rows[:count], key=segment), rows[count:]
                segments = []
                for key, neighbours in groupby(batch, key=keys.__getitem__):
                    own = list(neighbours)
                    uniforms = torch.from_numpy(np.stack([uniforms_of(requests[i].seed, key[1].max_tokens) for i in own]))
                    known, kept = (before[key], after[key]) if key in after else (None, None)
                    watched = [observers[i] for i in own] if observers else []
                    asked = [prompts[i] for i in own]
                    segments.append(Segment(self._ready[key[0]], asked, uniforms, key[1], known, kept, watched))
                for i, (ids, logprobs) in zip(batch, decode(segments), strict=True):
                    stopped = bool(len(ids)) and int(ids[-1]) in policies[i].stop_ids
                    text, written = policies[i].chat.read(ids.tolist())
                    finish: Literal["stop", "length"] = "stop" if stopped else "length"
                    completions[i] = Completion(requests[i].agent, text, prompts[i], ids, logprobs, finish, written=written)
                if self.watch is not None:
                    self.watch(len(completions), len(requests))
            self._memories |= after
        return [completions[i] for i in range(len(requests))]


def _one_batch(policy: Policy, other: Policy) -> bool:
    """Whether answers of both can be decoded in one batch: one policy, or adapters of one base.

    Decoding steps are 1.2 to 1.6 times as fast on a CPU core as with one batch per adapter (docs/performance.md).
    """
    if policy is other or policy.adapter is None or other.adapter is None:
        return policy is other
    same_base = policy.adapter.base is other.adapter.base
    return same_base and (policy.compute, policy.stop_ids) == (other.compute, other.stop_ids) and _mixes(policy)


def _mixes(policy: Policy) -> bool:
    """Whether a batch can have several segments: every layer attends to all tokens, and adapted layers keep rows apart."""
    return attends_to_all(policy) and (policy.adapter is None or policy.adapter.base.keeps_rows)


def _continues(policy: Policy) -> bool:
    """Whether a prompt can continue an earlier one and reuse its keys and values."""
    return policy.chat.grows and _reuses(policy)


def _reuses(policy: Policy) -> bool:
    """Whether keys and values of a text's beginning are those of any text that begins so."""
    config = policy.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    turns_with_length = rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope")  # keys depend on the text's length
    return attends_to_all(policy) and not turns_with_length


def _too_long(request: Request, length: int, limit: int) -> Completion:
    reason = (
        f"a history of {length} tokens and an answer of up to {request.sampling.max_tokens} exceed the model's {limit} "
        "positions; lower rollout.max_tokens or env.turns, or set rollout.history='last'"
    )
    return Completion(request.agent, "", finish_reason="error", error=reason)


def uniforms_of(seed: int, length: int) -> np.ndarray:
    """The random numbers of one answer: (length,) float32 in [0, 1), a function of its seed."""
    return np.random.Generator(np.random.Philox(key=seed)).random(length, dtype=np.float32)


@dataclass(slots=True)
class Segment:
    """Neighbouring rows of a batch: requests with one policy and one sampling setting."""

    policy: Policy
    prompts: Sequence[Ids]
    uniforms_BT: Tensor
    """(B, max_tokens) in [0, 1), the random number of each token."""
    sampling: Sampling
    before: Memory | None = None
    """Keys and values of an earlier call, for prompts that continue its answers; cleared when the prompts are read."""
    after: Memory | None = None
    """Receives keys and values of this call; None to keep none."""
    observers: Sequence[Observer | None] = ()
    """One per prompt, or none at all."""


def _bodies(policies: Sequence[Policy]) -> Callable[[Sequence[int]], Any]:
    """Number of rows of each policy -> the body for such a batch."""
    adapters = [policy.adapter for policy in policies if policy.adapter is not None]
    return Stack(adapters).on if adapters else lambda counts: policies[0].body


def _read_prompts(segment: Segment, room: int) -> tuple[Tensor, DynamicCache, Tensor]:
    """Reads each distinct prompt once: hidden states (B, D) of the prompts' last tokens, a cache with the distinct prompts and
    `room` further columns, and the row (B,) of each request's prompt in it."""
    policy, before, device = segment.policy, segment.before, segment.policy.device
    longest = max(map(len, segment.prompts))
    distinct = {prompt.tobytes(): prompt for prompt in segment.prompts}  # siblings' equal first prompts are read once
    rows = {key: row for row, key in enumerate(distinct)}
    ids_UL, mask_UL = (torch.zeros(len(distinct), longest, dtype=torch.int64) for _ in range(2))
    for row, prompt in enumerate(distinct.values()):
        ids_UL[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask_UL[row, longest - len(prompt) :] = 1
    positions_UL = (mask_UL.cumsum(-1) - 1).clamp_min(0)
    cache = new_cache(policy, longest + room)
    known = [None if before is None else before.find(prompt) for prompt in distinct.values()]
    if not any(known):
        known = [_read_beginning(policy, list(distinct.values()))] * len(distinct)
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
    new = slice(longest - num_new, longest)
    body = _bodies([policy])([len(distinct)])
    mask = None if bool(mask_UL.all()) else mask_UL.to(device)
    hidden_UD = _read(policy, body, cache, ids_UL[:, new].to(device), mask, positions_UL[:, new].to(device))
    spread_B = torch.tensor([rows[prompt.tobytes()] for prompt in segment.prompts], device=device)
    return hidden_UD[spread_B], cache, spread_B


def _read_beginning(policy: Policy, prompts: Sequence[Ids]) -> Layers | None:
    """Keys and values of the tokens that all prompts begin with, such as worked examples, so that they are read once; None for
    fewer than `BEGINNING` tokens."""
    shared = min(min(num_shared(prompts[0], prompt), len(prompt) - 1) for prompt in prompts)
    if len(prompts) == 1 or shared < BEGINNING or not _reuses(policy):
        return None
    cache = new_cache(policy, shared)
    assert isinstance(cache, GrowingCache)
    ids_BL = torch.from_numpy(prompts[0][None, :shared].astype(np.int64)).to(policy.device)
    body = _bodies([policy])([1])
    _read(policy, body, cache, ids_BL, None, torch.arange(shared, device=policy.device)[None])
    return cache.row(0, 0, shared)


def _read(
    policy: Policy, body: Any, cache: DynamicCache, ids_BL: Tensor, mask_BS: Tensor | None, positions_BL: Tensor
) -> Tensor:
    """Hidden states (B, D) of the last of `ids_BL`, which are added to the cache."""
    with compute_in(policy.compute, policy.device):
        output = body(
            input_ids=ids_BL, attention_mask=mask_BS, position_ids=positions_BL, past_key_values=cache, use_cache=True
        )
    return output.last_hidden_state[:, -1]


def decode(segments: Sequence[Segment]) -> list[tuple[Ids, np.ndarray]]:
    """Sample an answer to every prompt: a list of (ids (L,), log-probs (L,)), end-of-text included where sampled.

    The policies of all segments are one whole model, or adapters of one base. Each segment's prompts are read by themselves,
    so that they are padded to its own longest; tokens are decoded together.
    """
    policy, device = segments[0].policy, segments[0].policy.device
    owners = [segment for segment in segments for _ in segment.prompts]
    prompts = [prompt for segment in segments for prompt in segment.prompts]
    num, longest, steps = len(prompts), max(map(len, prompts)), max(segment.sampling.max_tokens for segment in segments)
    begun = [_read_prompts(segment, steps if len(segments) == 1 else 0) for segment in segments]
    hidden_BD = torch.cat([hidden for hidden, _, _ in begun])
    cache = joined([cache for _, cache, _ in begun], [spread for _, _, spread in begun], longest + steps)
    del begun
    starts_B = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    mask_BL = (torch.arange(longest + steps, device=device) >= starts_B[:, None]).long()
    padded = any(len(prompt) < longest for prompt in prompts)
    position_B = longest - 1 - starts_B
    uniforms_BT = torch.zeros(num, steps, device=device)
    for segment, own_BT in zip(segments, uniforms_BT.split([len(segment.prompts) for segment in segments]), strict=True):
        own_BT[:, : segment.sampling.max_tokens] = segment.uniforms_BT
    limits_B = torch.tensor([segment.sampling.max_tokens for segment in owners], device=device)
    tokens_BT = torch.zeros(num, steps, dtype=torch.int64, device=device)
    logps_BT = torch.zeros(num, steps, device=device)
    lengths_B = torch.zeros_like(limits_B)
    stops = torch.tensor(policy.stop_ids, device=device)
    rows_B = torch.arange(num, device=device)  # the request of each row of the shrinking batch
    live_B = torch.ones(num, dtype=torch.bool, device=device)
    counts = [len(segment.prompts) for segment in segments]
    segment_B = torch.arange(len(segments)).repeat_interleave(torch.tensor(counts)).to(device)
    observers = [observer for segment in segments for observer in segment.observers or [None] * len(segment.prompts)]
    bodies, kept = _bodies([segment.policy for segment in segments]), dict[int, Layers]()
    body = bodies(counts)

    def keep(leaving: Tensor) -> None:
        """Copy keys and values of these rows: of the prompt and of the answer without its last token."""
        if any(segment.after is not None for segment in segments):
            assert isinstance(cache, GrowingCache)
            requests = rows_B[leaving]
            for row, i, length in zip(leaving.tolist(), requests.tolist(), lengths_B[requests].tolist(), strict=True):
                if owners[i].after is not None:
                    kept[i] = cache.row(row, longest - len(prompts[i]), longest + length - 1)

    for step in range(steps):
        logits_BV = policy.logits(hidden_BD).float()
        next_B, logp_B = _draw(segments, counts, logits_BV, uniforms_BT[rows_B, step])
        tokens_BT[rows_B, step] = next_B
        logps_BT[rows_B, step] = logp_B
        stopped_B = (torch.isin(next_B, stops) | (limits_B[rows_B] == step + 1)) & live_B
        if any(observers):
            watched = [observers[i] if live else None for i, live in zip(rows_B.tolist(), live_B.tolist(), strict=True)]
            stopped_B |= torch.tensor(_observe(watched, next_B, logp_B, logits_BV), device=device)
        del logits_BV
        lengths_B[rows_B[stopped_B]] = step + 1
        live_B = live_B & ~stopped_B
        num_live = int(live_B.sum())
        if num_live == 0:
            break
        if num_live <= 0.8 * len(live_B):
            keep((~live_B).nonzero()[:, 0])
            staying = live_B.nonzero()[:, 0]
            cache.batch_select_indices(staying)
            rows_B, mask_BL, next_B, position_B = rows_B[staying], mask_BL[staying], next_B[staying], position_B[staying]
            live_B, segment_B = live_B[staying], segment_B[staying]
            counts = segment_B.bincount(minlength=len(segments)).tolist()
            body = bodies(counts)
        position_B = (position_B + 1).clamp_max(policy.max_positions - 1)  # a finished row may be read beyond its own limit
        mask_BS = mask_BL[:, : longest + step + 1] if padded else None
        hidden_BD = _read(policy, body, cache, next_B[:, None], mask_BS, position_B[:, None])
    keep(torch.arange(len(rows_B), device=device))
    tokens, logps = tokens_BT.cpu().numpy().astype(np.int32), logps_BT.cpu().numpy()
    answers = [(tokens[i, :length].copy(), logps[i, :length].copy()) for i, length in enumerate(lengths_B.tolist())]
    for i, layers in kept.items():
        memory = owners[i].after
        assert memory is not None
        memory.add(np.concatenate([prompts[i], answers[i][0]]), layers)
    return answers


def _observe(watched: Sequence[Observer | None], next_B: Tensor, logp_B: Tensor, logits_BV: Tensor) -> list[bool]:
    """Whether each row's observer, if it has one, ends its answer."""
    drawn = zip(watched, next_B.tolist(), logp_B.tolist(), logits_BV, strict=True)
    return [observer is not None and observer(token, logprob, logits_V) for observer, token, logprob, logits_V in drawn]


def _draw(segments: Sequence[Segment], counts: Sequence[int], logits_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and log-probs (B,), with each segment's sampling; neighbours with the same distribution draw together."""
    draws, end = [], 0
    for _, alike in groupby(zip(segments, counts, strict=True), key=lambda pair: pair[0].sampling.distribution()):
        members = list(alike)
        start, end = end, end + sum(count for _, count in members)
        if end > start:
            draws.append(sample(logits_BV[start:end], uniforms_B[start:end], **members[0][0].sampling.distribution()))
    tokens, logprobs = zip(*draws, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)
