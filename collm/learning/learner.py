"""The update: the order of an iteration, from episodes to new weights."""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from collm.errors import TrainingError
from collm.learning import critics
from collm.learning.batch import Batch
from collm.learning.credit import Assignment, assign_returns, assign_values
from collm.learning.parts import Hands
from collm.learning.residual import Regressions
from collm.learning.steps import require_finite
from collm.learning.tensors import Read, Tensors, restore
from collm.models.split import whole_weights
from collm.settings.rooms import Config
from collm.types import Annotation, Group, Metrics

Annotations = Mapping[int, Mapping[tuple[int, str], Annotation]]


@dataclass(slots=True)
class Update:
    """What an update returns beside the new weights."""

    metrics: Metrics
    """Name -> number; names of an agent's metrics begin with the agent's name."""
    annotations: Annotations
    """Episode's index among all of the iteration -> (turn, agent) -> value, TD error and advantage."""


class Learner(Protocol):
    """Changes a team's weights."""

    def update(self, groups: Sequence[Group], iteration: int) -> Update:
        """Learn from one iteration's groups; the episodes are not changed."""
        ...

    def credit(self, groups: Sequence[Group]) -> Annotations:
        """The annotations that `update` would return for these groups. Nothing is learned or changed."""
        ...

    def tensors(self) -> Mapping[str, Tensors]:
        """File name -> tensors of a checkpoint."""
        ...

    def restore(self, read: Read) -> None:
        """Load the output of `tensors`. Raises ValueError if it does not fit."""
        ...


class PartsLearner:
    """Updates a team: critics compute values, credit is assigned, then every part learns.

    Args:
        hands: calls the parts.
        agents: those that are trained.
        critic_labels: critic's label in metrics -> an agent that it predicts values for.
        regressions: the metric regression and those of the difference baseline, if the algorithm has them.
    """

    def __init__(
        self,
        hands: Hands,
        agents: Sequence[str],
        critic_labels: Mapping[str, str],
        regressions: Regressions,
        config: Config,
    ):
        self.hands, self.agents, self.critic_labels = hands, tuple(agents), dict(critic_labels)
        self.regressions, self.config = regressions, config

    def update(self, groups: Sequence[Group], iteration: int) -> Update:
        """Learn from one iteration's groups; the episodes are not changed.

        Raises TrainingError if a number is not finite, before the optimizer step that would use it.
        """
        batch = Batch.of(groups, self.agents)
        if not batch.episodes:
            raise TrainingError(f"iteration {iteration}: every episode failed: {groups[0].episodes[0].failure}")
        require_finite(batch.rewards_ET, "reward", iteration, batch)
        assigned, reading = self._assign(batch, self.regressions)
        require_finite(assigned.credit.advantages_ENT.flatten(1), "advantage", iteration, batch)
        learned = self.hands.all("learn", batch, iteration, assigned.credit)
        annotations = dict(zip(batch.numbers, assigned.annotations, strict=True))
        return Update(total([reading, assigned.metrics, *learned]), annotations)

    def credit(self, groups: Sequence[Group]) -> Annotations:
        """The annotations that `update` would return for these groups. Nothing is learned or changed."""
        batch = Batch.of(groups, self.agents)
        if not batch.episodes:
            return {}
        assigned, _ = self._assign(batch, copy.deepcopy(self.regressions))
        return dict(zip(batch.numbers, assigned.annotations, strict=True))

    def _assign(self, batch: Batch, regressions: Regressions) -> tuple[Assignment, Metrics]:
        """Credit for every answer, and metrics about the critics' reading. The regressions learn from the batch."""
        settings = self.config.algorithm
        if not settings.has_critic:
            return assign_returns(batch, settings, regressions), {}
        reads = self.config.critic.body != "none"
        text = self._read(batch) if reads else critics.without_text(batch)
        wanted_ENT = critics.targeted(batch, kind=settings.critic_kind, own_turns=self.config.critic.body == "policy")
        assigned = assign_values(
            batch, text, wanted_ENT, regressions, self.critic_labels, settings, critic_lam=self.config.critic.lam
        )
        return assigned, {"critic/cut": float(text.num_cut), "tokens/critic": float(text.num_tokens)} if reads else {}

    def _read(self, batch: Batch) -> critics.Values:
        """The values of all critics."""
        return critics.merge(values for values in self.hands.all("values", batch) if values is not None)

    def tensors(self) -> Mapping[str, Tensors]:
        """File name -> tensors of a checkpoint; those of parts elsewhere are fetched when they are read, one file at a time."""
        regressions = {name: whole_weights(module) for name, module in self.regressions.modules().items()}
        return ChainMap(regressions, *self.hands.all("tensors"))

    def restore(self, read: Read) -> None:
        """Load the output of `tensors`. Raises ValueError if it does not fit."""
        self.hands.all("restore", read)
        for name, module in self.regressions.modules().items():
            restore(module, read(name))


def total(records: Iterable[Metrics]) -> Metrics:
    """Metrics of several parts as one record; numbers under the same name, such as tokens, are added."""
    sums: Metrics = {}
    for record in records:
        for name, value in record.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums
