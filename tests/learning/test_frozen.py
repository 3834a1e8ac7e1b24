"""`critic.body = "frozen"`: a ridge regression on hidden states of a model that is not trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import critic_parts, frozen_parts, optimizers
from test_learning import make_trainer
from test_without_text import resumed_equally

from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.frozen import FrozenPart, features_at, since_last_marker
from collm.learning.pack import Packed, micro_batches
from collm.models.adapters import Base
from collm.models.critic import Critic
from collm.models.trees import hidden_states
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Completion, Episode, Group, Turn


@pytest.fixture(scope="module")
def base() -> Base:
    return Base.from_pretrained("tiny")


@pytest.fixture(scope="module")
def critic(base: Base) -> Critic:
    return Critic(base.bare(), base.tokenizer)


def ids_of(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.int32)


def test_features_are_means_over_middle_layers_and_over_what_was_read_since_the_last_value(critic: Critic) -> None:
    """Two siblings that begin alike, in one row and apart; by hand from all layers of each sequence."""
    packed = [
        Packed(ids_of(*range(5, 69), 9, 8, 7), markers=[(3, 63), (1, 66)]),
        Packed(ids_of(*range(5, 69), 9, 8, 11, 12), markers=[(0, 63), (2, 67)]),
    ]
    layers = critic.body.config.num_hidden_layers
    expected = torch.zeros(5, critic.body.config.hidden_size)
    for sequence in packed:
        states = critic.body(input_ids=torch.from_numpy(sequence.ids)[None].long(), use_cache=False, output_hidden_states=True)
        middle_LD = torch.stack(states.hidden_states[2:4])[:, 0].mean(0)  # the second and third of four
        assert layers == 4
        (first, end), (second, last) = sequence.markers
        expected[first], expected[second] = middle_LD[: end + 1].mean(0), middle_LD[end + 1 : last + 1].mean(0)
    together, num_tokens = features_at(critic, packed, 5, 8192)
    assert torch.allclose(together, expected, atol=1e-5)
    assert expected[[0, 1, 2, 3]].norm(dim=1).min() > 1
    assert not together[4].any()
    if critic.reads_trees:
        assert num_tokens == 64 + 3 + 2, "the common beginning is read once"
    apart, _ = features_at(critic, packed, 5, 70)
    assert torch.allclose(apart, expected, atol=1e-5)
    last = hidden_states(critic.body, torch.from_numpy(packed[0].ids)[None].long())
    assert not torch.allclose(last[0, :64].mean(0), expected[3], atol=0.1)  # the wrong layers


def test_spans_of_a_sequence_are_everything_that_is_read(critic: Critic) -> None:
    packed = [Packed(ids_of(4, 5, 6, 7, 8, 9), markers=[(0, 1), (2, 4), (1, 5)])]
    (micro,) = micro_batches(since_last_marker(packed), 100, torch.device("cpu"))
    assert micro.column_K.tolist() == [0, 1, 2, 3, 4, 5]
    assert micro.slot_S[micro.answer_K].tolist() == [0, 0, 2, 2, 2, 1]


TEAM = ("a", "b")


def told(task: int, word: str, reward: float) -> Episode:
    """One turn; agent a is shown the word."""
    answers = {agent: Completion(agent, "red", (), np.zeros(0)) for agent in TEAM}
    seen = {"a": f"Task {task}: the light is {word}.", "b": "Name one."}
    return Episode(task, 0, TEAM, turns=[Turn(seen, answers, reward, reward)], terminated=True, observations=seen)


def batch_of(first: int) -> Batch:
    tasks = range(first, first + 16)
    return Batch.of([Group(t, [told(t, "green" if t % 2 else "red", float(t % 2))]) for t in tasks], TEAM)


def part_of(critic: Critic, reads: str, agents: tuple[str, ...]) -> FrozenPart:
    config = parse_config({"env": {"name": "agree"}, "critic": {"body": "frozen", "reads": reads}})
    return FrozenPart("team" if reads == "joint" else agents[0], critic, agents, config, replay=2)


@pytest.mark.parametrize(("reads", "agents", "sees"), [("joint", TEAM, True), ("own", ("a",), True), ("own", ("b",), False)])
def test_a_ridge_on_hidden_states_learns_what_a_text_says(
    critic: Critic, reads: str, agents: tuple[str, ...], sees: bool
) -> None:
    part = part_of(critic, reads, agents)
    for first in (0, 16, 32):
        batch = batch_of(first)
        found = part.values(batch)
        values_EN = found.values_ENT[..., 0]
        assert not found.values_ENT[..., 1].any(), "after the end nothing is expected"
        if first == 0:
            assert not values_EN.any()
        zeros_ENT = torch.zeros(batch.shape)
        targets_ENT = batch.rewards_ET[:, None].expand(batch.shape)
        assert part.learn(batch, 0, Credit(zeros_ENT, targets_ENT, torch.ones(batch.shape), found.features)) == {}
    n = TEAM.index(agents[0])
    missed = (values_EN[:, n] - batch.rewards_ET[:, 0]).square().mean()
    assert (missed < 0.02) == sees, missed
    others = [m for m in range(2) if TEAM[m] not in agents]
    assert not values_EN[:, others].any()
    assert len(part.recent.records) == 2
    again = part_of(critic, reads, agents)
    again.restore(part.tensors().__getitem__)
    assert torch.equal(again.values(batch).values_ENT, part.values(batch).values_ENT)


def build(folder: Path, iterations: int, *, name: str = "run", algorithm: str = "collm-cc", **rooms: Any) -> Trainer:
    env = {"name": "str_build", "wording": "terse", "world": "persistent", "turns": 2, "strings": ["IT", "C"]}
    changes = {"algorithm": {"teammates": "none"}, "rollout": {"tasks": 4, "max_tokens": 12}, "env": env, **rooms}
    critic = {"body": "frozen", "replay": 2}
    return make_trainer(folder, algorithm, 2, 0, run={"name": name, "iterations": iterations}, critic=critic, **changes)


@pytest.mark.parametrize("algorithm", ["collm-cc", "collm-dc"])
def test_a_run_with_a_frozen_body_has_no_optimizer_and_resumes_exactly(tmp_path: Path, algorithm: str) -> None:
    def start(name: str, iterations: int) -> Trainer:
        return build(tmp_path, iterations, name=name, algorithm=algorithm)

    whole = resumed_equally(tmp_path, start)
    names = ["team"] if algorithm == "collm-cc" else ["builder_0", "builder_1"]
    files = {path.stem for path in (tmp_path / "whole" / "checkpoints" / "000004").glob("*.safetensors")}
    assert {name for name in files if "critic" in name} == {f"replay-critic-{name}" for name in names}
    assert not critic_parts(whole.learner)
    parts = frozen_parts(whole.learner)
    assert set(optimizers(whole.learner)) == {"builder_0", "builder_1"}
    assert len({id(part.critic.body.base) for part in parts}) == 1, "critics of one model share it"
    weight = parts[0].critic.body.base.model.get_input_embeddings().weight
    assert weight.grad is None
    assert not weight.requires_grad
    assert weight.data_ptr() not in {p.data_ptr() for policy in whole.team.policies.values() for p in policy.model.parameters()}


def test_with_adapters_it_reads_with_their_base_alone(tmp_path: Path) -> None:
    trainer = build(tmp_path, 1, team={"lora": {"rank": 4}})
    (part,) = frozen_parts(trainer.learner)
    policy = trainer.team.policies["builder_0"]
    assert policy.adapter is not None
    assert part.critic.body.base is policy.adapter.base
    batch = Batch.of(trainer.collect(), trainer.team.agents)
    before = part.values(batch).features[part.name]
    with torch.no_grad():
        for pair in policy.adapter.pairs.values():
            pair["B"].weight.add_(1.0)
    assert torch.equal(part.values(batch).features[part.name], before)
