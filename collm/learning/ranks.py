"""Ranks: the processes that hold one part together. Each reads a share of the part's micro-batches, and their sums are added.

Every rank calls the same methods in the same order. With whole copies, a rank has all parameters, and the ranks add their
gradients before each step. A model that is split (FSDP2, `models/split.py`) has a piece of every parameter in each rank.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from collm.models.split import is_split
from collm.types import Metrics

T = TypeVar("T")
PATIENCE = timedelta(hours=6)
"""Longest wait of a rank for another one. A rank that fails or is lost is seen by the driver, which ends the others."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """One rank's view of them all. `ALONE` is a part in one process."""

    number: int = 0
    count: int = 1
    split: bool = False
    """Whether a rank has only a piece of each parameter."""
    mesh: Any = None
    """torch's description of the ranks; None for one process."""

    @classmethod
    def join(cls, number: int, count: int, address: str, *, split: bool, device: str) -> Ranks:
        """Connect this process to the others; every rank calls it.

        address: HOST:PORT where rank 0 listens. device: "cpu" or "cuda".
        """
        import torch.distributed as dist

        host, _, port = address.rpartition(":")
        if host == "127.0.0.1":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"tcp://{host}:{port}", rank=number, world_size=count, timeout=PATIENCE)
        return cls(number, count, split, dist.device_mesh.init_device_mesh(device, (count,)))

    def deal(self, micros: Iterable[T]) -> Iterator[tuple[T, bool]]:
        """This rank's share, and whether it counts.

        The passes over a split model must be equally many in every rank; a rank without a micro-batch of its own repeats
        another's, which does not count.
        """
        if self.count == 1:
            yield from ((micro, True) for micro in micros)
            return
        dealt = list(micros)
        for first in range(0, len(dealt), self.count):
            if first + self.number < len(dealt):
                yield dealt[first + self.number], True
            elif self.split:
                yield dealt[first], False

    def total(self, numbers: Metrics) -> Metrics:
        """Sums over all ranks, or maxima of numbers whose names end in "_max"."""
        if self.count == 1:
            return numbers
        import torch.distributed as dist

        every: list[Any] = [None] * self.count
        dist.all_gather_object(every, dict(numbers))
        names = dict.fromkeys(name for found in every for name in found)
        combined: Metrics = defaultdict(float)
        for name in names:
            values = [found[name] for found in every if name in found]
            combined[name] = max(values) if name.endswith("_max") else sum(values)
        return combined

    def add(self, tensor: Tensor) -> Tensor:
        """Replace a tensor of the CPU by its sum over all ranks, and return it."""
        if self.count > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def add_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradients of all ranks; a parameter without one in any rank keeps none. Those of a split model are added in
        its backward pass."""
        if self.count == 1:
            return
        import torch.distributed as dist

        whole = [p for group in optimizer.param_groups for p in group["params"] if not is_split(p)]
        if not whole:
            return
        has = self.add(torch.tensor([p.grad is not None for p in whole], dtype=torch.int32))
        moved = [p for p, num in zip(whole, has.tolist(), strict=True) if num]
        for parameter in moved:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(moved):
            joined = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
            dist.all_reduce(joined)
            for parameter, summed in zip(bucket, joined.split([p.numel() for p in bucket]), strict=True):
                parameter.grad = summed.view_as(parameter).clone()


ALONE = Ranks()
BUCKET = 1 << 24
"""Numbers that are added at once, at least: small tensors travel together."""


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(p.numel() for p in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket
