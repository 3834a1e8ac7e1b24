"""A model whose parameters are split over several processes (PyTorch's FSDP2), for those that do not fit one device.

Each process has a piece of every parameter, of its gradient and of the optimizer's state. A layer's parameters are fetched
whole for its pass and let go after it. All processes must make equally many passes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from collm.errors import ConfigError

if TYPE_CHECKING:
    from collm.models.policy import Policy


def split_body(body: Any, mesh: Any) -> None:
    """Split a model's body, layer by layer. Gradients are summed over the processes, not averaged. Raises ConfigError for a
    model without layers that transformers marks as such."""
    from torch.distributed.fsdp import fully_shard

    layers = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ConfigError(
            f"{type(body).__name__} has no layers that can be split. Give its unit one device, or a smaller model."
        )
    for module in [*layers, body]:
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def split_policies(policies: Iterable[Policy], mesh: Any) -> None:
    """Split whole models. A vocabulary head that is tied to the embeddings stays so: it reads the split ones."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for policy in policies:
        embeddings, head = policy.model.get_input_embeddings(), policy.head
        tied = head.weight is embeddings.weight
        split_body(policy.body, mesh)
        if tied:
            head.weight = embeddings.weight
        else:
            pieces = distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            head.weight = nn.Parameter(pieces, requires_grad=head.weight.requires_grad)
        policy.split = True


def is_split(tensor: Tensor) -> bool:
    """Whether this process has only a piece of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor, on the CPU if it was split; every rank calls it."""
    split: Any = tensor
    return split.full_tensor().cpu() if is_split(tensor) else tensor


def piece_like(other: Tensor, tensor: Tensor) -> Tensor:
    """A whole tensor split as another one is."""
    if not is_split(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    split: Any = other
    return distribute_tensor(tensor.to(other.device), split.device_mesh, split.placements, src_data_rank=None)


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a module once, whole; tied weights under their first name. Every rank calls it."""
    kept, seen = module.state_dict(keep_vars=True), dict[int, str]()
    return {name: whole(t.detach()).contiguous() for name, t in kept.items() if seen.setdefault(id(t), name) == name}
