"""What of the vLLM engine can be checked without vLLM: what it is made with, the names of weights, who shares what."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from collm import tiny as tiny_model
from collm.engines.catalogue import make_engine
from collm.engines.local import LocalEngine
from collm.engines.vllm import checkpoint_tensors, model_options, places, write_config
from collm.errors import ConfigError
from collm.models.policy import Policy
from collm.models.team import Team
from collm.settings.load import parse_config
from collm.settings.rooms import LoraSettings, RolloutSettings, VllmSettings

RECIPE: dict[str, Any] = {"env": {"name": "agree"}}


def test_the_setting_chooses_the_engine(tiny: Policy) -> None:
    assert RolloutSettings().engine == "local"
    engine = make_engine(Team({"a": tiny}), RolloutSettings(batch_tokens=99))
    assert isinstance(engine, LocalEngine)
    assert engine.batch_tokens == 99


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_a_missing_package_names_the_extra(tiny: Policy) -> None:
    with pytest.raises(ConfigError, match=r"rollout.engine='vllm' .*collm\[vllm\].*rollout.engine='local'"):
        make_engine(Team({"a": tiny}), RolloutSettings(engine="vllm"))


def test_settings_are_checked() -> None:
    config = parse_config(RECIPE | {"rollout": {"engine": "vllm", "vllm": {"max_model_len": 512}}})
    assert config.rollout.vllm == VllmSettings(max_model_len=512)
    assert parse_config(config.resolved()) == config
    with pytest.raises(ConfigError, match=r"rollout.temperature=0.001: rollout.engine='vllm' samples at 0.01 or above"):
        parse_config(RECIPE | {"rollout": {"engine": "vllm", "temperature": 0.001}})
    with pytest.raises(ConfigError, match=r"evaluation.temperature=0.001"):
        parse_config(RECIPE | {"rollout": {"engine": "vllm"}, "evaluation": {"temperature": 0.001}})
    parse_config(RECIPE | {"rollout": {"temperature": 0.001}})
    with pytest.raises(ConfigError, match=r"rollout.vllm"):
        parse_config(RECIPE | {"rollout": {"engine": "vllm", "vllm": {"gpu_memory_utilization": 1.5}}})


def test_agents_share_models_and_bases(tiny: Policy) -> None:
    adapters = Team.from_pretrained({"a": "tiny", "b": "tiny"}, lora=LoraSettings(rank=2))
    assert places(adapters) == {"a": 0, "b": 0}
    mixed = Team({"whole": tiny, "a": adapters.policies["a"], "again": tiny, "b": adapters.policies["b"]})
    assert places(mixed) == {"whole": 0, "a": 1, "again": 0, "b": 1}


def test_what_a_model_is_made_with(tiny: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    half = model_options(Path("here"), [tiny], VllmSettings(), share=0.5)
    assert half["gpu_memory_utilization"] == 0.2
    assert half["kv_cache_memory_bytes"] == 2**29
    assert half["logprobs_mode"] == "processed_logprobs"
    assert half["dtype"] == "float32"
    assert half["max_model_len"] is None
    assert half["max_num_batched_tokens"] >= tiny.max_positions
    assert not half["enable_chunked_prefill"]
    assert "enable_lora" not in half
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert model_options(Path("here"), [tiny], VllmSettings(), share=1)["kv_cache_memory_bytes"] == 3 * 2**30
    long = model_options(Path("here"), [tiny], VllmSettings(max_model_len=1 << 20), share=1)
    assert long["max_model_len"] == tiny.max_positions == 4096


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (9, 16), (64, 64)])
def test_adapters_have_room(rank: int, room: int) -> None:
    team = Team.from_pretrained({"a": "tiny", "b": "tiny", "c": "tiny"}, lora=LoraSettings(rank=rank))
    options = model_options(Path("here"), list(team.policies.values()), VllmSettings(), share=1)
    assert (options["enable_lora"], options["max_loras"], options["max_lora_rank"]) == (True, 3, room)


def test_too_large_an_adapter_is_refused() -> None:
    team = Team.from_pretrained({"a": "tiny"}, lora=LoraSettings(rank=513))
    with pytest.raises(ConfigError, match=r"rank=513: vLLM has room for at most 512"):
        model_options(Path("here"), list(team.policies.values()), VllmSettings(), share=1)


def test_weights_have_the_names_of_a_checkpoint(tmp_path: Path, tiny: Policy) -> None:
    """Those of a saved folder, whole or under adapters, and they are the trainer's own numbers."""
    from safetensors.torch import load_file

    tiny.model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    adapted = Policy.from_pretrained("tiny", lora=LoraSettings(rank=2))
    for policy in (tiny, adapted):
        sent = dict(checkpoint_tensors(policy))
        assert sent.keys() == saved.keys()
        assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_a_tied_head_is_sent_by_itself(tmp_path: Path) -> None:
    sizes = {"vocab_size": 1536, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    policy = Policy(Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)), AutoTokenizer.from_pretrained(tiny_model.folder()))
    sent = dict(checkpoint_tensors(policy))
    assert torch.equal(sent["lm_head.weight"], sent["model.embed_tokens.weight"])
    write_config(policy, tmp_path)
    written = Qwen3Config.from_pretrained(tmp_path)
    assert (written.tie_word_embeddings, written.architectures) == (False, ["Qwen3ForCausalLM"])
    assert policy.model.config.tie_word_embeddings, "the trainer's own model stays tied"
