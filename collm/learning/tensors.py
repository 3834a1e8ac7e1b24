"""Converts modules and optimizers to the named tensors of a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from collm.models.split import piece_like, whole, whole_weights

Tensors = dict[str, Tensor]
Read = Callable[[str], Tensors]
"""read(file name without extension) -> tensors by name."""


class Files(Mapping[str, Tensors]):
    """File name -> tensors of a checkpoint, which are made when they are read."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensors]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Tensors:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


def state_of(optimizer: torch.optim.Optimizer) -> Tensors:
    """AdamW's averages and step counts. Learning rates are not included: they follow from the iteration."""
    return {
        f"{index}.{key}": whole(torch.as_tensor(value)).contiguous()
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }


def restore(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a module. Raises ValueError if their names are not those of the module."""
    expected = set(whole_weights(module))
    if expected != set(weights):
        raise ValueError(f"it holds other tensors than this team: {sorted(expected ^ set(weights))[:3]}")
    kept = module.state_dict()
    module.load_state_dict({name: piece_like(kept[name], tensor) for name, tensor in weights.items()}, strict=False)


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Tensors] = {}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = piece_like(parameters[int(index)], tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
