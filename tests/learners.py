"""What tests look at inside a learner of this process: its parts, optimizers, weights, and one more update of a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from collm.learning.batch import Batch
from collm.learning.frozen import FrozenPart
from collm.learning.learner import Learner, Update
from collm.learning.parts import CriticPart, PolicyPart
from collm.models.critic import ValueHead
from collm.training.trainer import Trainer


def policy_parts(learner: Learner) -> dict[str, PolicyPart]:
    return {part.name: part for part in learner.hands.parts if isinstance(part, PolicyPart)}


def critic_parts(learner: Learner) -> list[CriticPart]:
    return [part for part in learner.hands.parts if isinstance(part, CriticPart)]


def frozen_parts(learner: Learner) -> list[FrozenPart]:
    return [part for part in learner.hands.parts if isinstance(part, FrozenPart)]


def value_heads(learner: Learner) -> dict[str, ValueHead]:
    """By the name of the critic: heads of critic models, and those on policies."""
    heads = {part.name.removeprefix("critic-"): part.critic.value for part in critic_parts(learner)}
    return heads | {agent: head for part in policy_parts(learner).values() for agent, head in part.heads.items()}


def optimizers(learner: Learner) -> dict[str, torch.optim.Optimizer]:
    return {part.name: part.optimizer for part in learner.hands.parts if not isinstance(part, FrozenPart)}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Every parameter that the learner changes, under its owner's name; a critic's own begin with "critic"."""
    found: dict[str, torch.Tensor] = {}
    for name, part in policy_parts(learner).items():
        found |= {f"{name}.{n}": p.detach() for n, p in part.policy.model.named_parameters()}
        found |= {f"critic-{a}.{n}": p.detach() for a, head in part.heads.items() for n, p in head.named_parameters()}
    for critic in critic_parts(learner):
        found |= {f"{critic.name}.{n}": p.detach() for n, p in critic.critic.named_parameters()}
    return found


def again(run: Path) -> Trainer:
    """The trainer of a finished run as it was at the end: tests that share the run may change it, each its own."""
    trainer = Trainer.resume(run, quiet=True)
    trainer.run()
    return trainer


def one_more(trainer: Trainer, groups: list[Any] | None = None) -> tuple[Batch, Update]:
    """Another iteration's episodes (or those given), as a batch, and what the update said."""
    groups = trainer.collect() if groups is None else groups
    update = trainer.learner.update(groups, trainer.iteration)
    return Batch.of(groups, trainer.team.agents), update


def advantages_of(batch: Batch, update: Update, turn: int, agent: str) -> torch.Tensor:
    """(E,) what one agent's answers of one turn were trained with."""
    return torch.tensor([update.annotations[number][turn, agent].advantage for number in batch.numbers]).double()
