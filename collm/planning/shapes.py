"""Shapes of models: the numbers that planning needs, read from a model's config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.errors import ConfigError
from collm.models.sources import ADAPTER_CONFIG, base_named_by, folder_of, is_adapter
from collm.settings.rooms import LoraSettings


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-like language model.

    tied: the vocabulary head shares the embedding's weights. qk_norm: norms on queries and keys (Qwen3). qkv_bias: biases on
    queries, keys and values (Qwen2).
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    qk_norm: bool = False
    qkv_bias: bool = False

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name -> (inputs, outputs)."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def linear_weights(self) -> int:
        """Parameters of the linear layers of all blocks."""
        return self.layers * sum(a * b for a, b in self.linear.values())

    @property
    def body(self) -> int:
        """Parameters without the vocabulary head."""
        block = 2 * self.hidden
        block += 2 * self.head_dim * self.qk_norm + (self.heads + 2 * self.kv_heads) * self.head_dim * self.qkv_bias
        return self.embedding + self.linear_weights + self.layers * block + self.hidden

    @property
    def parameters(self) -> int:
        return self.body + self.embedding * (not self.tied)

    def adapter(self, lora: LoraSettings) -> int:
        """Number of parameters of one LoRA adapter. Raises ConfigError for layers that the model does not have."""
        chosen = self.linear if lora.targets == ["all-linear"] else lora.targets
        unknown = [name for name in chosen if name not in self.linear]
        if unknown:
            raise ConfigError(
                f"team.lora.targets names {unknown[0]!r}; planning knows {', '.join(self.linear)}, or 'all-linear'."
            )
        return self.layers * lora.rank * sum(sum(self.linear[name]) for name in chosen)


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int) -> Shape:
    return Shape(layers, hidden, heads, 8, 128, intermediate, 151936, tied=True, qk_norm=True)


KNOWN = {
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen3-4B-Instruct-2507": _qwen3(36, 2560, 32, 9728),
    "Qwen/Qwen2.5-Coder-3B": Shape(36, 2048, 16, 2, 128, 11008, 151936, tied=True, qkv_bias=True),
}
"""Published shapes of the models in the recipes, for machines without the model and without access to the hub."""


def read_shape(source: str) -> Shape:
    """The shape of "tiny", a Hugging Face folder (for an adapter that of its base), a model in the hub's cache, or a known one.

    Raises ConfigError where none is found, or for an architecture that planning does not support.
    """
    folder = folder_of(source)
    if folder is None:
        if source in KNOWN:
            return KNOWN[source]
        raise ConfigError(
            f"model {source!r} cannot be planned: it is neither a folder here nor the branch main of a model in the hub's "
            f"cache, and its shape is not known. Download its settings (`hf download {source} --include '*.json'`), or name a "
            f"folder. Known: {', '.join(KNOWN)}."
        )
    if is_adapter(folder):
        return read_shape(base_named_by(source))
    config = _read_json(folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    kind = str(config.get("model_type"))
    if not kind.startswith(("qwen2", "qwen3", "llama", "mistral")) or "moe" in kind:
        raise ConfigError(f"model {source!r} is of the kind {kind!r}; planning knows Llama, Mistral, Qwen2 and Qwen3 shapes.")
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            int(config["num_hidden_layers"]),
            hidden,
            heads,
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or hidden // heads),
            int(config["intermediate_size"]),
            int(config["vocab_size"]),
            bool(config.get("tie_word_embeddings", False)),
            kind.startswith("qwen3"),
            kind.startswith("qwen2") or bool(config.get("attention_bias", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"model {source!r}: its config.json lacks a number that planning needs ({error!r}).") from error


def read_adapter(source: str) -> LoraSettings:
    """The settings of an adapter, given its folder or hub name. Raises ConfigError where it cannot be read."""
    path = (folder_of(source) or Path(source)) / ADAPTER_CONFIG
    config = _read_json(path)
    try:
        targets = config["target_modules"]
        targets = ["all-linear"] if targets == "all-linear" else sorted([targets] if isinstance(targets, str) else targets)
        return LoraSettings(rank=config["r"], targets=targets)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} lacks what planning needs ({error!r}).") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}.") from error
