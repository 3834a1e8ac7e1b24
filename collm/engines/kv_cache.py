"""Key-value caches: within one answer, and from one turn to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from collm.models.policy import Policy
from collm.types import Ids

Layers = list[tuple[Tensor, Tensor]]
"""For every layer, keys and values (H, S, D) of one row."""


@dataclass(slots=True)
class Memory:
    """Keys and values of one call's rows, for a next call whose prompts begin with those prompts and answers."""

    tokens: int = 0
    """Number of tokens held."""
    _rows: dict[bytes, Layers] = field(default_factory=dict)
    _lengths: set[int] = field(default_factory=set)

    def add(self, ids: Ids, layers: Layers) -> None:
        """Add a row. ids: (L,) prompt and answer. layers: keys and values of its tokens, without the last sampled one."""
        self.tokens += layers[0][0].shape[1]
        self._rows[ids.tobytes()] = layers
        self._lengths.add(len(ids))

    def find(self, prompt: Ids) -> Layers | None:
        """Keys and values of the longest row that `prompt` begins with; None if there is none."""
        for length in sorted((n for n in self._lengths if n < len(prompt)), reverse=True):
            layers = self._rows.get(prompt[:length].tobytes())
            if layers is not None:
                return layers
        return None

    def clear(self) -> None:
        self.tokens = 0
        self._rows.clear()
        self._lengths.clear()


def new_cache(policy: Policy, length: int) -> DynamicCache:
    """A cache for `length` tokens; models with sliding windows or other special layers get transformers' own kind."""
    config = policy.model.config.get_text_config()
    return GrowingCache(length) if attends_to_all(policy) else DynamicCache(config=config)


def attends_to_all(policy: Policy) -> bool:
    """Whether every layer of the model attends to all earlier tokens."""
    config = policy.model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return set(kinds) == {"full_attention"} and getattr(config, "sliding_window", None) is None


class _GrowingLayer(DynamicLayer):
    """Keys and values in a buffer of the final length: a new token is written in place, not concatenated."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.used = length, 0
        self.is_initialized = False

    def begin(self, batch: int, keys: Tensor, values: Tensor) -> None:
        """Allocate buffers for `batch` rows with the heads of `keys` and `values` (..., H, S, D).

        Keys take the format of values: under autocast they come in float32, and attention would cast all of them at each token.
        """
        self.buffers = [values.new_zeros(batch, states.shape[-3], self.length, states.shape[-1]) for states in (keys, values)]
        self.dtype, self.device, self.is_initialized = values.dtype, values.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.begin(len(key_states), key_states, value_states)
        end = self.used + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.used : end] = states
        self.use(end)
        return self.keys, self.values

    def use(self, end: int) -> None:
        """Make the columns before `end` visible to attention."""
        self.used = end
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]
        self.use(self.used)


class GrowingCache(DynamicCache):
    """A key-value cache with a fixed final length."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_GrowingLayer(self.length))
        return self.layers[layer_idx].update(key_states, value_states)

    def begin(self, rows: Sequence[Layers | None], counts: Sequence[int], end: int) -> None:
        """Fill the columns before `end` with the first `counts` tokens of each row, right-aligned; earlier columns are zero."""
        filled = next(layers for layers in rows if layers is not None)
        for depth, (keys, values) in enumerate(filled):
            layer = _GrowingLayer(self.length)
            layer.begin(len(rows), keys, values)
            for row, (layers, count) in enumerate(zip(rows, counts, strict=True)):
                if layers is not None and count > 0:
                    for buffer, states in zip(layer.buffers, layers[depth], strict=True):
                        buffer[row, :, end - count : end] = states[:, :count]
            layer.use(end)
            self.layers.append(layer)

    def row(self, row: int, start: int, end: int) -> Layers:
        """A copy of the keys and values of one row in columns `start` to `end`."""
        return [
            (keys[row, :, start:end].clone(), values[row, :, start:end].clone())
            for keys, values in (layer.buffers for layer in self.layers)
        ]


def joined(caches: Sequence[DynamicCache], rows: Sequence[Tensor], length: int) -> DynamicCache:
    """One cache of chosen rows of each cache, one cache's behind the other's, right-aligned; takes the caches' layers.

    Several caches must be growing ones.
    """
    if len(caches) == 1:
        if len(rows[0]) > len(caches[0].layers[0].keys):
            caches[0].batch_select_indices(rows[0])
        return caches[0]
    whole, sizes = GrowingCache(length), list(map(len, rows))
    for _ in range(len(caches[0].layers)):
        parts: Any = [cache.layers.pop(0) for cache in caches]
        layer = _GrowingLayer(length)
        layer.begin(sum(sizes), parts[0].keys, parts[0].values)
        end = max(part.used for part in parts)
        for n, buffer in enumerate(layer.buffers):
            for part, chosen, own in zip(parts, rows, buffer.split(sizes), strict=True):
                own[:, :, end - part.used : end] = part.buffers[n][chosen, :, : part.used]
        layer.use(end)
        whole.layers.append(layer)
    return whole
