"""The update: the order of an iteration, from episodes to new weights."""

from __future__ import annotations

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
from collm.learning.tensors import Read, Tensors, restore, weights_of
from collm.settings.rooms import Config
from collm.types import Annotation, Group, Metrics

Annotations = Mapping[int, Mapping[tuple[int, str], Annotation]]


@dataclass(slots=True)
class Update:
    """What an update gives beside new weights.

    metrics: by name, each under its agent's. annotations: episode's number among all of the iteration -> (turn, agent) ->
    value, TD error and advantage, for a person to read.
    """

    metrics: Metrics
    annotations: Annotations


class Learner(Protocol):
    """Changes a team's weights."""

    def update(self, groups: Sequence[Group], iteration: int) -> Update:
        """Learn from one iteration's groups; the episodes are not changed."""
        ...

    def tensors(self) -> dict[str, Tensors]:
        """By file name, all that a checkpoint keeps."""
        ...

    def restore(self, read: Read) -> None:
        """Take what `tensors` once gave. Raises ValueError where it does not fit."""
        ...


class PartsLearner:
    """Updates a team: critics read, credit is assigned from small tensors, then every part learns.

    Args:
        agents: those that are trained. critic_labels: what metrics call each critic -> an agent that it reads for.
        regressions: the metric regression and those of the difference baseline, as far as the algorithm has them.
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

        Raises TrainingError where a number is not finite, before the step that it would have spoilt.
        """
        batch = Batch.of(groups, self.agents)
        if not batch.episodes:
            raise TrainingError(f"iteration {iteration}: every episode failed: {groups[0].episodes[0].failure}")
        require_finite(batch.rewards_ET, "reward", iteration, batch)
        assigned, reading = self._assign(batch)
        require_finite(assigned.credit.advantages_ENT.flatten(1), "advantage", iteration, batch)
        learned = self.hands.all("learn", batch, iteration, assigned.credit)
        annotations = dict(zip(batch.numbers, assigned.annotations, strict=True))
        return Update(total([reading, assigned.metrics, *learned]), annotations)

    def _assign(self, batch: Batch) -> tuple[Assignment, Metrics]:
        """Credit for every answer, and what reading it cost."""
        settings = self.config.algorithm
        if not settings.has_critic:
            return assign_returns(batch, settings, self.regressions), {}
        text = critics.merge(values for values in self.hands.all("values", batch) if values is not None)
        wanted_ENT = critics.targeted(batch, kind=settings.critic_kind, own_turns=self.config.critic.body == "policy")
        assigned = assign_values(
            batch, text, wanted_ENT, self.regressions, self.critic_labels, settings, critic_lam=self.config.critic.lam
        )
        return assigned, {"critic/cut": float(text.num_cut), "tokens/critic": float(text.num_tokens)}

    def tensors(self) -> dict[str, Tensors]:
        """By file name, all that a checkpoint keeps."""
        files = {name: weights_of(module) for name, module in self.regressions.modules().items()}
        for part in self.hands.all("tensors"):
            files |= part
        return files

    def restore(self, read: Read) -> None:
        """Take what `tensors` once gave. Raises ValueError where it does not fit."""
        self.hands.all("restore", read)
        for name, module in self.regressions.modules().items():
            restore(module, read(name))


def total(records: Iterable[Metrics]) -> Metrics:
    """Metrics of several parts as one record; what several count under one name, such as tokens, is added up."""
    sums: Metrics = {}
    for record in records:
        for name, value in record.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums
