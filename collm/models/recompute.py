"""Gradient checkpointing: activations inside layers are recomputed in the backward pass instead of kept.

It saves most of the activation memory and costs one more forward pass; the numbers are the same. The switch of transformers is
not used, since it works in training mode only, which enables dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from collm.errors import ConfigError
from collm.models.adapters import Adapter


class _Recomputed(nn.Module):
    """Mixed into a layer's class. again: returns the context for repeating the present pass later."""

    again: Callable[[], AbstractContextManager[None]] = staticmethod(nullcontext)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(super().__call__, **kwargs)
        if not torch.is_grad_enabled():
            return run(*args)
        second = self.again()
        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), second))


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {})


def recompute_layers(body: Any) -> None:
    """Enable gradient checkpointing for a model's body, or for the base of an adapter (once for all adapters on it)."""
    model = body.base.body if isinstance(body, Adapter) else body
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"learner.gradient_checkpointing=true, but {type(model).__name__} has no layers that can be computed again. "
            "Set it to false, and lower learner.micro_batch_tokens instead."
        )
    for layer in layers:
        if not isinstance(layer, _Recomputed):
            kind: Any = type(layer)
            layer.__class__ = _recomputed(kind)
        if isinstance(body, Adapter):
            layer.again = body.base.again
