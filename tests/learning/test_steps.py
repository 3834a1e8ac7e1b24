"""A policy step: what of it is taken back, by hand; and a team that earned the same everywhere keeps its answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learners import policy_parts
from test_learning import make_trainer

from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.pack import micro_batches, pack_answers
from collm.learning.parts import PolicyPart
from collm.learning.steps import good_answers, make_optimizer, retreat
from collm.types import Completion, Episode, Group, Turn


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_a_retreat_is_a_fraction_of_the_last_step(fraction: float) -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    other = torch.nn.Parameter(torch.tensor([4.0]))  # has a gradient in the first step alone
    optimizer = make_optimizer([([weight], 0.1), ([other], 0.2)])
    for gradient in ([1.0, 2.0, -3.0], [0.5, -4.0, 0.0], [0.0, 0.0, 0.0]):
        before = weight.detach().clone()
        weight.grad = torch.tensor(gradient)
        other.grad = torch.tensor([1.0]) if gradient[0] == 1.0 else None
        optimizer.step()
        rest = other.item()
        after = weight.detach().clone()
        assert (after - before).abs().min() > 0.01  # momentum alone moves it, too
        retreat(optimizer, [weight], fraction)
        assert other.item() == rest  # was not moved in this step, though the optimizer has its momentum
        assert torch.allclose(weight, after + fraction * (before - after), atol=1e-6)


def episodes_of(rewards: list[list[float]]) -> Batch:
    """Episodes of two agents with these rewards."""
    agents, groups = ("a", "b"), []
    for number, row in enumerate(rewards):
        answers = {agent: Completion(agent, "x") for agent in agents}
        turns = [Turn(dict.fromkeys(agents, ""), answers, reward, reward) for reward in row]
        groups.append(Group(number, [Episode(number, 0, agents, turns=turns, terminated=True)]))
    return Batch.of(groups, agents)


def credit_of(advantages_ENT: list[Any]) -> Credit:
    found = torch.tensor(advantages_ENT)
    return Credit(found, torch.zeros_like(found), torch.zeros_like(found))


def test_good_answers_by_hand() -> None:
    batch = episodes_of([[0.0, 1.0], [0.0, 0.0], [1.0]])  # returns-to-go at gamma 0.5: 0.5 1, 0 0, 1; means 0.5 and 0.5
    advantages_ENT = [[[0.3, 0.2], [-0.5, 0.9]], [[0.1, 9.0], [0.5, 0.2]], [[-1.0, 0.0], [0.4, 0.0]]]  # means 1.72 and 0.3
    good_ENT = good_answers(batch, credit_of(advantages_ENT), gamma=0.5)
    assert good_ENT.tolist() == [
        [[False, False], [False, True]],
        [[False, False], [False, False]],
        [[False, False], [True, False]],  # the second turn was not played
    ]


@pytest.mark.parametrize("advantage", [0.0, -0.085, 0.3, 1e-9])
def test_where_all_answers_earned_the_same_all_are_good(advantage: float) -> None:
    batch = episodes_of([[1.0]] * 7)
    assert good_answers(batch, credit_of([[[advantage]] * 2] * 7), gamma=0.9).all()


def log_prob(part: PolicyPart, batch: Batch) -> float:
    """Mean log-prob of the batch's answers."""
    packed = [sequence for agent in part.agents for sequence in pack_answers(batch, agent, part.policy)]
    total = 0.0
    with torch.no_grad():
        for micro in micro_batches(packed, 8192, part.policy.device):
            hidden_KD = part.policy.hidden(micro.ids_BL)[micro.row_K, micro.column_K]
            total += part.policy.score(hidden_KD, micro.token_K, part.sampling).sum().item()
    return total / len(packed)


@pytest.mark.parametrize("name", ["collm-cc", "magrpo"])
def test_a_team_that_earned_the_same_everywhere_keeps_its_answers(tmp_path: Path, name: str) -> None:
    """An iteration at a high rate gives the optimizer momentum; in the next all answers earn the same."""
    drops = {}
    for max_drop in ("none", 0.03):
        changes = {"algorithm": {"name": name, "max_drop": max_drop}, "learner": {"lr": 3e-3}, "rollout": {"tasks": 4}}
        trainer = make_trainer(tmp_path / str(max_drop), name, 2, 0, **changes)
        trainer.learner.update(trainer.collect(), 0)
        trainer.engine.load(trainer.team)
        trainer.iteration, groups = 1, trainer.collect()
        for group in groups:
            for episode in group.episodes:
                for turn in episode.turns:
                    turn.reward = 1.0
        batch = Batch.of(groups, trainer.team.agents)
        parts = policy_parts(trainer.learner).values()
        before = [log_prob(part, batch) for part in parts]
        update = trainer.learner.update(groups, 1)
        drops[max_drop] = [was - log_prob(part, batch) for was, part in zip(before, parts, strict=True)]
        fractions = [update.metrics.get(f"{part.name}/step_fraction", 1.0) for part in parts]
        assert all(fraction == 1.0 for fraction in fractions) == (max_drop == "none")
    print(drops)
    assert max(drops["none"]) > 0.1
    assert max(drops[0.03]) <= 0.03 + 1e-4
