"""Records of the last iterations, from which critics learn again, and their form in a checkpoint."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from collm.learning.pack import Packed
from collm.learning.tensors import Tensors
from collm.models.blueprint import MINIBATCH


class Recent:
    """The named tensors of each of the last `num` iterations; older ones are dropped."""

    def __init__(self, num: int):
        self.records: deque[Tensors] = deque(maxlen=num)

    def add(self, record: Mapping[str, Tensor]) -> None:
        self.records.append({name: tensor.clone() for name, tensor in record.items()})

    def joined(self, name: str) -> Tensor:
        """One tensor of all records, the oldest first."""
        return torch.cat([record[name] for record in self.records])

    def tensors(self) -> Tensors:
        """ "NUMBER.NAME" -> tensor of a checkpoint, the oldest record first."""
        return {f"{number}.{name}": tensor for number, record in enumerate(self.records) for name, tensor in record.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the output of `tensors`."""
        found: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            number, _, name = key.partition(".")
            found.setdefault(int(number), {})[name] = tensor
        self.records.clear()
        self.records.extend(found[number] for number in sorted(found))


def flattened(packed: Sequence[Packed], targets_X: Tensor, wanted_X: Tensor) -> Tensors:
    """One record: the sequences that hold targets, with the positions of their markers.

    Args: targets_X, wanted_X: as of `critics.by_slot`.
    """
    rows = [(p.ids, [(slot, position) for slot, position in p.markers if wanted_X[slot]]) for p in packed]
    rows = [(ids, markers) for ids, markers in rows if markers]
    slots = [slot for _, markers in rows for slot, _ in markers]
    return {
        "ids": torch.cat([torch.zeros(0, dtype=torch.int32), *(torch.from_numpy(ids).int() for ids, _ in rows)]),
        "lengths": torch.tensor([len(ids) for ids, _ in rows], dtype=torch.int64),
        "counts": torch.tensor([len(markers) for _, markers in rows], dtype=torch.int64),
        "positions": torch.tensor([position for _, markers in rows for _, position in markers], dtype=torch.int64),
        "targets": targets_X[slots],
    }


def minibatches(recent: Recent, num: int, stream: random.Random) -> Iterator[tuple[list[Packed], Tensor]]:
    """`num` minibatches of `MINIBATCH` kept sequences: (sequences, (M,) targets); the slots of markers are indices of targets.

    Sequences are drawn without replacement until all were drawn once, then again.
    """
    lengths, counts = recent.joined("lengths").tolist(), recent.joined("counts").tolist()
    ids, positions = recent.joined("ids").split(lengths), recent.joined("positions").split(counts)
    targets = recent.joined("targets").split(counts)
    size = min(MINIBATCH, len(lengths))
    order: list[int] = []
    for _ in range(num if size else 0):
        if len(order) < size:
            order += stream.sample(range(len(lengths)), len(lengths))
        chosen, order = order[:size], order[size:]
        packed, slot = [], 0
        for s in chosen:
            markers = list(enumerate(positions[s].tolist(), start=slot))
            packed.append(Packed(ids[s].numpy(), markers=markers))
            slot += len(markers)
        yield packed, torch.cat([targets[s] for s in chosen])
