"""Grouped attention while generating gives the numbers of transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from collm import tiny
from collm.engines.local import Segment, decode
from collm.models import attention
from collm.models.policy import Policy
from collm.types import Sampling


@pytest.mark.parametrize(("heads", "shared", "length"), [(8, 2, 1), (6, 3, 1), (4, 4, 1), (4, 1, 1), (8, 2, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_same_numbers_as_sdpa(heads: int, shared: int, length: int, masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(3, heads, length, 16, dtype=torch.float64)
    key, value = torch.randn(2, 3, shared, 9, 16, dtype=torch.float64)
    mask = None
    if masked:
        mask = torch.ones(3, 1, length, 9, dtype=torch.bool)
        mask[1, ..., :4] = mask[2, ..., :7] = False
    module = torch.nn.Module()
    module.num_key_value_groups = heads // shared
    given = {"scaling": 0.3, "dropout": 0.0, "sliding_window": None}
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, **given)
    answer, _ = attention.sdpa_grouped(module, query, key, value, mask, **given)
    assert answer.shape == expected.shape == (3, length, heads, 16)
    torch.testing.assert_close(answer, expected, rtol=0, atol=1e-12)


def test_a_wrong_order_of_heads_fails() -> None:
    """Query head h reads key head h // (H / K): heads taken the other way round give other numbers."""
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, 1, 8), torch.randn(2, 1, 2, 5, 8)
    right, _ = attention.sdpa_grouped(torch.nn.Module(), query, key, value, None)
    wrong, _ = attention.sdpa_grouped(torch.nn.Module(), query[:, [0, 2, 1, 3]], key, value, None)
    assert (right[:, :, [0, 2, 1, 3]] - wrong).abs().max() > 0.1


def test_generation_is_unchanged_and_saved_models_say_nothing_of_it(tmp_path: Path) -> None:
    policy = Policy.from_pretrained("tiny")
    assert policy.model.config._attn_implementation == attention.NAME
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 700, length).astype(np.int32) for length in (40, 25, 33, 40, 7)]
    uniforms = torch.from_numpy(rng.random((5, 12), dtype=np.float32))
    with torch.inference_mode():
        ours = decode([Segment(policy, prompts, uniforms, Sampling(max_tokens=12))])
        policy.model.set_attn_implementation("sdpa")
        theirs = decode([Segment(policy, prompts, uniforms, Sampling(max_tokens=12))])
    for (ids, logprobs), (expected_ids, expected_logprobs) in zip(ours, theirs, strict=True):
        assert ids.tolist() == expected_ids.tolist()
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=1e-5)
    policy.model.set_attn_implementation(attention.NAME)
    policy.save(tmp_path)
    assert "sdpa" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_model_that_asks_for_another_attention_keeps_it() -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = Qwen3ForCausalLM._from_config(Qwen3Config(vocab_size=32, **small), attn_implementation="eager")
    attention.adopt(model)
    assert model.config._attn_implementation == "eager"


def test_one_step_after_another_equals_one_pass() -> None:
    """With a cache and left padding, token by token, the hidden states are those of the whole text."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder(), dtype=torch.float64).eval()
    attention.adopt(model)
    ids = torch.randint(4, 700, (1, 20), generator=torch.Generator().manual_seed(0))
    whole = model.base_model(input_ids=ids).last_hidden_state
    cache, mask = DynamicCache(), torch.ones(1, 23, dtype=torch.int64)
    mask[:, :3] = 0
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    parts = []
    for start, end in [(0, 8), *((i, i + 1) for i in range(8, 23))]:
        parts.append(
            model.base_model(
                input_ids=padded[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        )
    torch.testing.assert_close(torch.cat(parts, 1)[:, 3:], whole, rtol=0, atol=1e-10)


def test_siblings_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal prompts go through the model once; every answer is as if its prompt had stood alone."""
    policy = Policy.from_pretrained("tiny")
    rng = np.random.default_rng(0)
    one, two = (rng.integers(4, 700, length).astype(np.int32) for length in (30, 21))
    prompts = [one, two, one, one, two]
    uniforms = torch.from_numpy(rng.random((5, 8), dtype=np.float32))
    shapes: list[tuple[int, ...]] = []
    forward = policy.body.forward

    def count(*args: object, **settings: object) -> object:
        shapes.append(tuple(settings["input_ids"].shape))  # type: ignore[attr-defined]
        return forward(*args, **settings)

    monkeypatch.setattr(policy.body, "forward", count)
    with torch.inference_mode():
        together = decode([Segment(policy, prompts, uniforms, Sampling(max_tokens=8))])
        assert shapes[0] == (2, 30)
        assert all(shape[1] == 1 and shape[0] <= 5 for shape in shapes[1:])
        assert len(shapes) <= 8  # nothing is read after the last token
        for row, prompt in enumerate(prompts):
            [(ids, logprobs)] = decode([Segment(policy, [prompt], uniforms[row : row + 1], Sampling(max_tokens=8))])
            assert ids.tolist() == together[row][0].tolist()
            np.testing.assert_allclose(logprobs, together[row][1], atol=1e-5)
