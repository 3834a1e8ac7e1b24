"""Casts under bfloat16, which give the answers of autocast, bit for bit; observers, which may end an answer."""

from __future__ import annotations

import numpy as np
import torch

from collm.engines.local import LocalEngine, Observer, Segment, decode
from collm.models.policy import Policy
from collm.models.team import Team
from collm.types import Message, Request, Sampling

SAMPLING = Sampling(max_tokens=16)
CHATS = [(Message("user", text),) for text in ("Name one colour.", "Build IT together.", "again " * 20)]


def answers(engine: LocalEngine) -> list[tuple[list[int], list[float]]]:
    completions = engine.generate([Request("a", chat, SAMPLING, seed) for seed, chat in enumerate(CHATS)])
    return [(completion.token_ids.tolist(), completion.logprobs.tolist()) for completion in completions]


def test_cast_linear_layers_give_the_answers_of_autocast():
    policy = Policy.from_pretrained("tiny", compute="bfloat16")
    ready = policy.for_generation()
    casts = {name: weight.dtype for name, weight in ready.model.named_parameters(remove_duplicate=False)}
    assert {casts[name] for name in casts if "_proj" in name or "lm_head" in name} == {torch.bfloat16}
    assert {casts[name] for name in casts if "norm" in name or "embed" in name} == {torch.float32}
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.float32}
    prompts, uniforms = [policy.chat.encode(chat) for chat in CHATS], torch.rand(len(CHATS), SAMPLING.max_tokens)
    with torch.inference_mode():
        both = [decode([Segment(each, prompts, uniforms, SAMPLING)]) for each in (policy, ready)]
    for (ids, logprobs), (others, also) in zip(*both, strict=True):
        assert ids.tolist() == others.tolist()
        assert np.array_equal(logprobs, also)


def test_cast_weights_are_those_of_the_last_load():
    policy = Policy.from_pretrained("tiny", compute="bfloat16")
    team = Team({"a": policy})
    engine = LocalEngine(team)
    before = answers(engine)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "_proj" in name:
                weight.mul_(1.1)
    assert answers(engine) == before
    engine.load(team)
    assert answers(engine) != before
    assert answers(engine) == answers(LocalEngine(team))
    engine.rest()
    assert not engine._ready


def test_weights_that_are_not_cast_are_not_copied():
    whole = Policy.from_pretrained("tiny")
    assert whole.for_generation() is whole
    half = Policy.from_pretrained("tiny", compute="bfloat16")
    shared = {id(weight) for weight in half.model.parameters()}
    for name, weight in half.for_generation().model.named_parameters():
        assert ("norm" in name or "embed" in name) == (id(weight) in shared), name


def test_observers_see_every_token_and_end_their_own_answer_alone(tiny):
    """Rows leave the batch at different steps, and each observer goes on with its own."""
    requests = [Request("a", chat, Sampling(2.0, max_tokens=12 + seed), 10 + seed) for seed, chat in enumerate(CHATS * 2)]
    alone = [c for request in requests for c in LocalEngine(Team({"a": tiny})).generate([request])]
    seen: dict[int, list[tuple[int, float]]] = {i: [] for i in (0, 1, 3, 4)}

    def observer(i: int, last: int) -> Observer:
        def observe(token: int, logprob: float, logits_V: torch.Tensor) -> bool:
            expected = torch.log_softmax(logits_V / 2.0, dim=-1)[token].item()
            assert abs(logprob - expected) < 1e-5
            seen[i].append((token, logprob))
            return len(seen[i]) == last

        return observe

    limits = {0: 3, 1: 99, 3: 1, 4: 5}
    observers = [observer(i, limits[i]) if i in limits else None for i in range(len(requests))]
    together = LocalEngine(Team({"a": tiny})).generate(requests, observers)
    for i, (one, whole) in enumerate(zip(together, alone, strict=True)):
        count = min(limits.get(i, 99), len(whole.token_ids))
        assert one.token_ids.tolist() == whole.token_ids[:count].tolist()
        np.testing.assert_allclose(one.logprobs, whole.logprobs[:count], atol=1e-4)
        if i in seen:
            assert [token for token, _ in seen[i]] == one.token_ids.tolist()
            assert [logprob for _, logprob in seen[i]] == one.logprobs.tolist()
