"""Statistics that judge a critic, and target normalization."""

from __future__ import annotations

import math

import pytest
import torch

from collm.algorithms.stats import RunningMoments, explained_variance
from collm.models.critic import ValueHead


def test_explained_variance_by_hand():
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance (4 + 1 + 0 + 9)/4 = 3.5
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns + 7, returns) == pytest.approx(1.0)  # a constant error is no variance
    assert explained_variance(torch.full((4,), 9.0), returns) == pytest.approx(0.0)
    # Errors 0, 0, 0, 4: mean 1, variance (1 + 1 + 1 + 9)/4 = 3; 1 - 3/3.5.
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0, 2.0]), returns) == pytest.approx(1 - 3 / 3.5)
    assert explained_variance(-returns, returns) == pytest.approx(1 - 4.0)  # residual 2R


def test_nothing_to_explain_is_not_a_number():
    assert math.isnan(explained_variance(torch.tensor([1.0]), torch.tensor([2.0])))
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))
    assert math.isnan(explained_variance(torch.randn(5), torch.full((5,), 0.7)))


def test_running_moments_by_hand():
    moments = RunningMoments(rate=0.1)
    assert (moments.mean, moments.deviation) == (0.0, 1.0)
    moments.update(torch.tensor([1.0, 3.0]))  # corrected for the start at zero: mean 2, second moment 5, variance 1
    assert moments.mean == pytest.approx(2.0)
    assert moments.deviation == pytest.approx(1.0)
    moments.update(torch.tensor([6.0]))
    # weights 0.09 and 0.1 of 0.19: mean (0.09*2 + 0.1*6)/0.19, second (0.09*5 + 0.1*36)/0.19
    mean, second = 0.78 / 0.19, 4.05 / 0.19
    assert moments.mean == pytest.approx(mean)
    assert moments.deviation == pytest.approx((second - mean**2) ** 0.5)


def test_running_moments_of_equal_targets_have_a_small_positive_deviation():
    moments = RunningMoments()
    for _ in range(5):
        moments.update(torch.full((7,), 123.456))
    assert moments.mean == pytest.approx(123.456, rel=1e-6)
    assert 0 < moments.deviation < 0.01


def test_rescaling_targets_changes_no_prediction():
    """PopArt: whatever targets come, V of any hidden state is what it was."""
    torch.manual_seed(0)
    head = ValueHead(16)
    torch.nn.init.normal_(head.weight, std=0.02)
    hidden = torch.randn(20, 16)
    before = head(hidden).detach()
    for scale in (1.0, 50.0, 0.01, 300.0):
        head.rescale(scale * torch.randn(9) + scale)
        assert torch.allclose(head(hidden), before, atol=2e-4 * max(1.0, scale))
    assert head.deviation > 1  # it did follow the targets
    # The wrong variant, changing the statistics alone, moves predictions:
    head.mean += 1.0
    assert (head(hidden) - before).abs().min() > 0.5


def test_rescaling_by_no_targets_changes_nothing():
    head = ValueHead(4)
    head.rescale(torch.tensor([3.0, 9.0]))
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    head.rescale(torch.zeros(0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in head.state_dict().items())


def test_a_value_head_survives_saving():
    head = ValueHead(8)
    torch.nn.init.normal_(head.weight, std=0.02)
    head.rescale(torch.tensor([3.0, 9.0, 4.0]))
    copy = ValueHead(8)
    copy.load_state_dict(head.state_dict())
    hidden = torch.randn(5, 8)
    assert torch.equal(copy(hidden), head(hidden))
    for one in (head, copy):
        one.rescale(torch.tensor([100.0, -20.0]))
    assert torch.equal(copy(hidden), head(hidden))
    assert (copy.moments.weight, copy.moments.first, copy.moments.second) == (
        head.moments.weight,
        head.moments.first,
        head.moments.second,
    )


def test_a_value_head_expects_nothing_before_it_is_taught():
    """A random one would tell two turns of an episode apart for no reason, and agents would learn from that."""
    assert ValueHead(8)(torch.randn(5, 8)).tolist() == [0.0] * 5
