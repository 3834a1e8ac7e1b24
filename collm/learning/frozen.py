"""A critic with a frozen body (`critic.body="frozen"`): a ridge regression on hidden states, without gradient or optimizer.

The features of a history before a turn are the mean over the tokens that were read since the value before it: the answers of
the last turn and the newest observations; before the first turn, everything. Of each token they are the mean over the middle
half of the layers. Where a history is cut or rewritten, everything in it is read anew. Each turn has a regression, which is
fitted in closed form to the targets of the last iterations.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from collm.algorithms.regression import TaskRidge
from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.critics import TextCritic, Values, shared
from collm.learning.pack import Packed, micro_batches
from collm.learning.recent import Recent
from collm.learning.tensors import Read, Tensors
from collm.models.blueprint import REPLAY
from collm.models.critic import Critic
from collm.settings.rooms import Config
from collm.types import Metrics


class FrozenPart(TextCritic):
    """A critic that is not trained, and what it learned from.

    replay: number of recent iterations that the regressions are fitted to.
    """

    def __init__(self, name: str, critic: Critic, agents: Sequence[str], config: Config, *, replay: int):
        super().__init__(name, critic, agents, config)
        self.recent = Recent(replay)

    def tensors(self) -> dict[str, Tensors]:
        return {REPLAY + self.name: self.recent.tensors()}

    def restore(self, read: Read) -> None:
        self.recent.restore(read(REPLAY + self.name))

    def values(self, batch: Batch) -> Values:
        """V by the regressions on earlier iterations; 0 in the first one."""
        E, N, T = batch.shape
        packed, num_cut = self.pack(batch)
        limit = self.config.learner.micro_batch_tokens
        features_XD, num_tokens = features_at(self.critic, packed, E * N * (T + 1), limit)
        n = batch.agents.index(self.agents[0])
        features_EtD = features_XD.view(E, N, T + 1, -1)[:, n]
        values_ENt = torch.zeros(E, N, T + 1)
        values_ENt[:, n] = self.predicted(features_EtD)
        found = shared(values_ENt.flatten(), packed, batch, self.agents, num_tokens)
        found.num_cut, found.features = num_cut, {self.name: features_EtD}
        return found

    def predicted(self, features_EtD: Tensor) -> Tensor:
        """(E, T + 1) V of features (E, T + 1, D). A turn without samples uses the last one before it."""
        values_Et = torch.zeros(features_EtD.shape[:2])
        if not self.recent.records:
            return values_Et
        kept = {name: self.recent.joined(name) for name in ("features", "targets", "tasks", "turns")}
        fitted: TaskRidge | None = None
        for t in range(features_EtD.shape[1]):
            chosen = kept["turns"] == t
            if chosen.any():
                fitted = TaskRidge(kept["features"][chosen], kept["targets"][chosen], kept["tasks"][chosen])
            if fitted is not None:
                values_Et[:, t] = fitted(features_EtD[:, t])
        return values_Et

    def learn(self, batch: Batch, iteration: int, credit: Credit) -> Metrics:
        """Keep the iteration's features and targets; the body is not changed."""
        n = batch.agents.index(self.agents[0])
        wanted_ET = credit.wanted_ENT[:, n].bool()
        e_S, t_S = wanted_ET.nonzero().T
        features_SD = credit.features[self.name][e_S, t_S]
        targets_S = credit.targets_ENT[e_S, n, t_S]
        self.recent.add({"features": features_SD, "targets": targets_S, "tasks": batch.tasks_E[e_S], "turns": t_S})
        return {}


@torch.no_grad()
def features_at(critic: Critic, packed: Sequence[Packed], num: int, limit: int) -> tuple[Tensor, int]:
    """Features (num, D) at the markers' slots, 0 at slots without a marker; and the number of tokens read.

    limit: maximum tokens in one forward pass.
    """
    features_XD = torch.zeros(num, critic.body.config.get_text_config().hidden_size)
    num_tokens = 0
    for micro in micro_batches(since_last_marker(packed), limit, critic.device, trees=critic.reads_trees):
        read_KD = critic.middle(micro.ids_BL, micro.tree)[micro.row_K, micro.column_K]
        sums_SD = read_KD.new_zeros(len(micro.slot_S), read_KD.shape[1]).index_add(0, micro.answer_K, read_KD)
        counts_S = torch.bincount(micro.answer_K, minlength=len(micro.slot_S)).clamp_min(1)
        features_XD[micro.slot_S.cpu()] = (sums_SD / counts_S[:, None]).cpu()
        num_tokens += micro.num_tokens
    return features_XD, num_tokens


def since_last_marker(packed: Sequence[Packed]) -> list[Packed]:
    """The same sequences; instead of answers they name the tokens from after the last marker to each marker, under its slot.

    `MicroBatch.row_K` and `column_K` are the places of the tokens before an answer's, so each starts one token later.
    """
    found = []
    for sequence in packed:
        starts = [0, *(position + 1 for _, position in sequence.markers)]
        spans = [
            (slot, start + 1, np.zeros(position + 1 - start, dtype=np.float32))
            for (slot, position), start in zip(sequence.markers, starts, strict=False)
        ]
        found.append(Packed(sequence.ids, answers=spans))
    return found
