"""Converts modules and optimizers to the named tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Read = Callable[[str], Tensors]
"""read(file name without extension) -> tensors by name."""


def weights_of(module: nn.Module) -> Tensors:
    """Every tensor of a module once; tied weights under their first name."""
    seen: dict[tuple[int, torch.Size], str] = {}
    weights = {}
    for name, tensor in module.state_dict().items():
        if seen.setdefault((tensor.data_ptr(), tensor.shape), name) == name or tensor.numel() < 2:
            weights[name] = tensor.detach().contiguous()
    return weights


def state_of(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's averages and step counts. Learning rates are not included: they follow from the iteration."""
    return {
        f"{index}.{key}": torch.as_tensor(value).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a module. Raises ValueError if their names are not those of the module."""
    expected = set(weights_of(module))
    if expected != set(weights):
        raise ValueError(f"it holds other tensors than this team: {sorted(expected ^ set(weights))[:3]}")
    module.load_state_dict(dict(weights), strict=False)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
