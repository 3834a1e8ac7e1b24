"""Critics that learn again from recent iterations, and critics that predict a histogram of returns."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from learners import critic_parts, value_heads
from test_learning import make_trainer
from test_without_text import resumed_equally

from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.critics import by_slot
from collm.learning.pack import Packed
from collm.learning.recent import MINIBATCH, Recent, flattened, minibatches
from collm.models.critic import HistogramHead, ValueHead
from collm.training.trainer import Trainer


def sequences(num: int, first: int) -> tuple[list[Packed], torch.Tensor, torch.Tensor]:
    """`num` sequences of two markers each; the target of a slot is its number, and every third has none."""
    packed = [
        Packed(np.array([first, s, 7, 8], dtype=np.int32)[: 3 + s % 2], markers=[(2 * s, 1), (2 * s + 1, 2)])
        for s in range(num)
    ]
    slots = torch.arange(2 * num)
    return packed, slots + 100.0 * first, slots % 3 != 2


def test_a_minibatch_holds_kept_sequences_with_the_targets_of_their_markers() -> None:
    recent = Recent(2)
    for first in (1, 2, 3):
        recent.add(flattened(*sequences(6, first)))
    seen: list[tuple[int, int]] = []
    for packed, targets_M in minibatches(recent, 3, random.Random(0)):
        assert len(packed) == MINIBATCH
        assert [slot for p in packed for slot, _ in p.markers] == list(range(len(targets_M)))
        for p in packed:
            first, s = p.ids[:2].tolist()
            assert len(p.ids) == 3 + s % 2
            wanted = [(100 * first + slot, slot - 2 * s + 1) for slot in (2 * s, 2 * s + 1) if slot % 3 != 2]
            assert [(targets_M[slot].item(), position) for slot, position in p.markers] == wanted
            seen.append((first, s))
    assert set(seen[:12]) == {(first, s) for first in (2, 3) for s in range(6)}, "iteration 1 was dropped, each once at first"
    assert len(set(seen[12:])) == 12


def test_what_is_kept_survives_a_checkpoint() -> None:
    recent, other = Recent(3), Recent(3)
    for first in range(12):
        recent.add(flattened(*sequences(2, first)))
    tensors = recent.tensors()
    other.restore(dict(sorted(tensors.items(), reverse=True)))
    assert {name: tensor.tolist() for name, tensor in other.tensors().items()} == {n: t.tolist() for n, t in tensors.items()}
    assert other.joined("ids").reshape(-1, 7)[:, 0].tolist() == [9, 10, 11]
    Recent(2).restore(Recent(2).tensors())
    assert list(minibatches(_one_without_targets(), 3, random.Random(0))) == []


def _one_without_targets() -> Recent:
    recent = Recent(1)
    packed, targets_X, wanted_X = sequences(2, 1)
    recent.add(flattened(packed, targets_X, torch.zeros_like(wanted_X)))
    return recent


def build(folder: Path, iterations: int = 1, *, name: str = "run", tasks: int = 4, **critic: Any) -> Trainer:
    env = {"name": "str_build", "wording": "terse", "world": "persistent", "turns": 2, "strings": ["IT", "C"]}
    rooms = {"algorithm": {"teammates": "none"}, "rollout": {"tasks": tasks, "max_tokens": 12}, "env": env}
    rooms["critic"] = {"body": "auto", **critic}
    return make_trainer(folder, "collm-cc", 2, 0, run={"name": name, "iterations": iterations}, **rooms)


def test_steps_on_one_small_iteration_are_those_without_a_replay(tmp_path: Path) -> None:
    """Four sequences fit into one minibatch: the order of a sum is all that differs."""
    trainers = [build(tmp_path / str(replay), epochs=2, replay=replay) for replay in (1, 3)]
    groups = trainers[0].collect()
    heads = []
    for trainer in trainers:
        trainer.learner.update(groups, 0)
        heads.append(value_heads(trainer.learner)["team"].weight.detach())
    assert torch.allclose(heads[0], heads[1], rtol=0, atol=2e-5)
    assert heads[0].abs().max() > 5e-4
    assert [len(part.recent.records) for part in critic_parts(trainers[1].learner)] == [1]
    assert critic_parts(trainers[0].learner)[0].recent is None


@pytest.mark.parametrize("loss", ["mse", "hl_gauss"])
def test_a_replay_resumes_exactly(tmp_path: Path, loss: str) -> None:
    def start(name: str, iterations: int) -> Trainer:
        return build(tmp_path, iterations, name=name, tasks=2, epochs=3, replay=2, loss=loss)

    whole = resumed_equally(tmp_path, start)
    files = {path.stem for path in (tmp_path / "whole" / "checkpoints" / "000004").glob("*.safetensors")}
    assert {"critic-team", "optimizer-critic-team", "replay-critic-team"} <= files
    assert isinstance(value_heads(whole.learner)["team"], HistogramHead if loss == "hl_gauss" else ValueHead)


def test_a_histogram_begins_at_the_mean_of_the_first_targets_and_stretches() -> None:
    head, hidden = HistogramHead(3), torch.randn(5, 3)
    assert head(hidden).tolist() == [0.0] * 5
    head.rescale(torch.tensor([1.0, 1.0, 4.0, 2.0]))
    assert head(hidden).tolist() == pytest.approx([2.0] * 5, abs=0.02)
    assert (head.lowest.item(), head.highest.item()) == (1.0, 4.0)
    assert head.centres[[2, -3]].tolist() == pytest.approx([1.0, 4.0])
    targets = torch.tensor([1.0, 2.345, 4.0])
    assert (head.smoothed(targets) @ head.centres.float()).tolist() == pytest.approx(targets.tolist(), abs=1e-3)
    head.rescale(torch.tensor([-5.0]))
    assert (head.lowest.item(), head.highest.item()) == (-5.0, 4.0)
    same = HistogramHead(3)
    same.rescale(torch.full((4,), 0.7))
    assert same(hidden).tolist() == pytest.approx([0.7] * 5, abs=1e-5)
    assert torch.isfinite(same.loss(hidden, torch.full((5,), 0.7), num_values=5))


def test_a_histogram_learns_a_linear_value() -> None:
    generator = torch.Generator().manual_seed(0)
    head, hidden = HistogramHead(4), torch.randn(256, 4, generator=generator)
    targets = hidden[:, 0].clamp(-1, 1) * 0.5 + 3
    head.rescale(targets)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.0)
    for _ in range(80):
        optimizer.zero_grad()
        head.loss(hidden, targets, num_values=256).backward()
        optimizer.step()
    assert (head(hidden) - targets).square().mean() < 0.1 * targets.var()


def test_value_heads_may_predict_histograms(tmp_path: Path) -> None:
    critic = {"body": "policy", "reads": "own", "loss": "hl_gauss"}
    trainer = build(tmp_path, **critic)
    update = trainer.learner.update(trainer.collect(), 0)
    heads = value_heads(trainer.learner)
    assert {type(head) for head in heads.values()} == {HistogramHead}
    for agent, head in heads.items():
        assert head.lowest < head.highest
        assert head.weight.abs().max() > 1e-4
        assert update.metrics[f"{agent}/critic/loss"] > 0


def test_targets_are_found_by_slot() -> None:
    targets_ENT = torch.arange(12.0).view(2, 2, 3)
    targets_X, wanted_X = by_slot(targets_ENT, targets_ENT > 3, kind="V")
    assert targets_X.view(2, 2, 4)[1, 0].tolist() == [6.0, 7.0, 8.0, 0.0]
    assert wanted_X.view(2, 2, 4)[0].tolist() == [[False] * 4, [False, True, True, False]]
    assert by_slot(targets_ENT, targets_ENT > 3, kind="Q")[0].tolist() == list(range(12))


def test_an_update_of_a_histogram_moves_its_values_to_the_targets(tmp_path: Path) -> None:
    trainer = build(tmp_path, epochs=12, loss="hl_gauss", lr=2e-3)
    batch = Batch.of(trainer.collect(), trainer.team.agents)
    part = critic_parts(trainer.learner)[0]
    wanted_ENT = torch.ones(batch.shape)
    targets_ENT = torch.tensor([0.0, 1.0]).expand(batch.shape)
    part.learn(batch, 0, Credit(torch.zeros(batch.shape), targets_ENT, wanted_ENT))
    values_ET = part.values(batch).values_ENT[:, 0]
    assert (values_ET[:, 1] - values_ET[:, 0]).min() > 0.5
    assert values_ET.abs().max() < 1.1


def test_first_targets_that_are_all_alike_are_predicted_and_do_not_fix_the_bias() -> None:
    for value in (100.0, -100.0, 1.0):
        head, hidden = HistogramHead(3), torch.randn(5, 3)
        head.rescale(torch.full((6,), value))
        assert head(hidden).tolist() == pytest.approx([value] * 5, rel=1e-4)
    head.rescale(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert head(hidden).mean().item() == pytest.approx(0.75, abs=0.05)
