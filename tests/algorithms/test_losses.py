"""Losses against gradients by hand, on the right side of the clip, and additive over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from collm.algorithms import losses
from collm.algorithms.catalogue import CLIPPED_LOSSES

# A toy policy over three tokens: z = (ln 1, ln 2, ln 1), p = (0.25, 0.5, 0.25).
# Two answers: tokens 0, 2 with A = 2, and token 1 with A = -1.
TOKENS = torch.tensor([0, 2, 1])
ANSWERS = torch.tensor([0, 0, 1])
ADVANTAGES = torch.tensor([2.0, -1.0], dtype=torch.float64)


def toy():
    z = torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64, requires_grad=True)
    return z, torch.log_softmax(z, -1)[TOKENS]


def number(value):
    return torch.tensor([value], dtype=torch.float64, requires_grad=True)


def test_reinforce_gradient_by_hand():
    # d log p_k / dz = e_k - p. dL/dz = -1/2 (2 (e_0 + e_2 - 2p) - (e_1 - p)) = -1/2 (2e_0 + 2e_2 - e_1 - 3p)
    #       = -1/2 (2 - 0.75, -1 - 1.5, 2 - 0.75) = (-0.625, 1.25, -0.625)
    z, logp = toy()
    loss, _ = losses.reinforce(logp, ANSWERS, ADVANTAGES, num_answers=2)
    # L = -1/2 (2 (ln 0.25 + ln 0.25) - ln 0.5) = -1/2 (-8 ln 2 + ln 2) = 3.5 ln 2
    assert loss.item() == pytest.approx(3.5 * math.log(2))
    loss.backward()
    assert torch.allclose(z.grad, torch.tensor([-0.625, 1.25, -0.625], dtype=torch.float64))


def test_the_mean_of_token_logprobs_is_another_gradient():
    """Length-normalized answers, a common wrong variant, have half the pull on the two-token answer."""
    z, logp = toy()
    loss, _ = losses.reinforce(logp / torch.tensor([2.0, 2.0, 1.0]), ANSWERS, ADVANTAGES, num_answers=2)
    loss.backward()
    assert not torch.allclose(z.grad, torch.tensor([-0.625, 1.25, -0.625], dtype=torch.float64), atol=0.1)


@pytest.mark.parametrize("name", list(CLIPPED_LOSSES))
@pytest.mark.parametrize("clip", [1e-6, 0.2])
def test_clipped_losses_at_ratio_one_have_the_gradient_of_reinforce(name, clip):
    z, logp = toy()
    loss, stats = CLIPPED_LOSSES[name](logp, logp.detach(), ANSWERS, ADVANTAGES, clip=clip, num_answers=2)
    # L = -1/2 sum over tokens of A = -1/2 (2 + 2 - 1)
    assert loss.item() == pytest.approx(-1.5)
    loss.backward()
    assert torch.allclose(z.grad, torch.tensor([-0.625, 1.25, -0.625], dtype=torch.float64))
    assert stats["clipped"] == 0.0


# clip 0.2. Ratio 1.5: A = 1 earns min(1.5, 1.2), flat; A = -1 pays max(1.5, 1.2), slope = ratio. Ratio 0.5: A = 1 earns
# min(0.5, 0.8), slope; A = -1 pays max(0.5, 0.8), flat. Inside, 1.1 and 0.9: never flat.
@pytest.mark.parametrize("name", list(CLIPPED_LOSSES))
@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 1.0, -1.2, 0.0),
        (1.5, -1.0, 1.5, 1.5),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_clipping_acts_on_the_side_that_has_moved_far_enough(name, ratio, advantage, value, slope):
    logp, old = number(math.log(ratio) - 3), torch.tensor([-3.0], dtype=torch.float64)
    adv, answer = torch.tensor([advantage], dtype=torch.float64), torch.tensor([0])
    loss, stats = CLIPPED_LOSSES[name](logp, old, answer, adv, clip=0.2, num_answers=1)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert logp.grad.item() == pytest.approx(slope)
    assert stats["clipped"] == float(slope == 0)


def test_a_sequence_has_one_ratio_and_tokens_have_their_own():
    # Token ratios 4 and 1: geometric mean 2. A = -1. Sequence: 2 tokens * 2 = 4, slope 2*2*(1/2) = 2 on each token.
    # Per token: 4 + 1 = 5, slopes 4 and 1.
    old = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    for name, value, slopes in (("sequence_clip", 4.0, [2.0, 2.0]), ("ppo_clip", 5.0, [4.0, 1.0])):
        logp = (old + torch.tensor([math.log(4), 0.0])).detach().requires_grad_()
        adv = torch.tensor([-1.0], dtype=torch.float64)
        loss, _ = CLIPPED_LOSSES[name](logp, old, torch.tensor([0, 0]), adv, clip=0.2, num_answers=1)
        loss.backward()
        assert loss.item() == pytest.approx(value)
        assert logp.grad.tolist() == pytest.approx(slopes)
    # A = +1: the sequence is clipped as a whole (2 * 1.2, flat); per token only the first (1.2 + 1; the second pulls).
    for name, value, slopes, clipped in (("sequence_clip", -2.4, [0.0, 0.0], 2.0), ("ppo_clip", -2.2, [0.0, -1.0], 1.0)):
        logp = (old + torch.tensor([math.log(4), 0.0])).detach().requires_grad_()
        adv = torch.tensor([1.0], dtype=torch.float64)
        loss, stats = CLIPPED_LOSSES[name](logp, old, torch.tensor([0, 0]), adv, clip=0.2, num_answers=1)
        loss.backward()
        assert loss.item() == pytest.approx(value)
        assert logp.grad.tolist() == pytest.approx(slopes)
        assert stats["clipped"] == clipped


def test_answer_sums_go_to_their_answers_in_any_order():
    values, answers = torch.tensor([1.0, 10.0, 100.0, 1000.0]), torch.tensor([2, 0, 2, 0])
    assert losses.answer_sums(values, answers, 4).tolist() == [1010.0, 0.0, 101.0, 0.0]


def parts(name, keep):
    """A loss and its gradient over the answers in `keep`, with num_answers of the whole update."""
    torch.manual_seed(3)
    lengths = [3, 1, 4, 2, 6]
    answer = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    logp = (-torch.rand(16, dtype=torch.float64)).requires_grad_()
    old, adv = logp.detach() + 0.4 * torch.randn(16).double(), torch.randn(5).double()
    chosen = torch.isin(answer, torch.tensor(keep))
    renumbered = torch.tensor([keep.index(a) for a in answer[chosen].tolist()])
    if name == "reinforce":
        loss, _ = losses.reinforce(logp[chosen], renumbered, adv[keep], num_answers=5)
    elif name == "kl":
        loss, _ = losses.kl_to_reference(logp[chosen], old[chosen], num_answers=5)
    else:
        loss, _ = CLIPPED_LOSSES[name](logp[chosen], old[chosen], renumbered, adv[keep], clip=0.2, num_answers=5)
    loss.backward()
    return loss.item(), logp.grad


@pytest.mark.parametrize("name", ["reinforce", "ppo_clip", "sequence_clip", "kl"])
def test_micro_batches_add_up(name):
    whole, gradient = parts(name, [0, 1, 2, 3, 4])
    for split in ([[0], [1], [2], [3], [4]], [[0, 1, 2], [3, 4]], [[4, 0], [2, 3, 1]]):
        pieces = [parts(name, keep) for keep in split]
        assert sum(loss for loss, _ in pieces) == pytest.approx(whole, abs=1e-12)
        assert torch.allclose(sum(grad for _, grad in pieces), gradient, atol=1e-12)


def test_value_errors_add_up():
    torch.manual_seed(4)
    values, targets = torch.randn(2, 5).double()
    for loss in (lambda s: losses.value_error(values[s], targets[s], num_values=5)[0],):
        assert loss(slice(0, 2)) + loss(slice(2, 5)) == pytest.approx(loss(slice(0, 5)).item())


def test_kl_by_hand():
    # d = ln 2: 2 - ln 2 - 1; d = -ln 2: 0.5 + ln 2 - 1. Two answers.
    logp = torch.tensor([-2.0, -1.0], dtype=torch.float64)
    reference = logp + torch.tensor([math.log(2), -math.log(2)])
    loss, stats = losses.kl_to_reference(logp, reference, num_answers=2)
    assert loss.item() == pytest.approx(0.25)
    assert stats["kl"] == pytest.approx(0.5)


def test_kl_is_never_negative_and_zero_with_zero_gradient_at_equality():
    torch.manual_seed(5)
    logp, reference = -3 * torch.rand(2, 1000, dtype=torch.float64)
    for k in range(1000):
        assert losses.kl_to_reference(logp[k : k + 1], reference[k : k + 1], num_answers=1)[0] >= 0
    same = logp.clone().requires_grad_()
    loss, _ = losses.kl_to_reference(same, logp, num_answers=1)
    loss.backward()
    assert loss.item() == 0
    assert same.grad.abs().max() == 0


def test_kl_estimate_has_the_divergence_as_its_mean():
    p, q = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([0.6, 0.1, 0.3]).double()
    expected = (p * (p / q).log()).sum().item()
    mean = sum(p[k] * losses.kl_to_reference(p[k : k + 1].log(), q[k : k + 1].log(), num_answers=1)[0] for k in range(3))
    assert mean.item() == pytest.approx(expected)


def test_value_error_by_hand_and_its_target_has_no_gradient():
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    targets = torch.tensor([3.0, -1.0], requires_grad=True)
    loss, _ = losses.value_error(values, targets, num_values=4)
    loss.backward()
    assert loss.item() == pytest.approx((4 + 9) / 4)
    assert values.grad.tolist() == pytest.approx([2 * -2 / 4, 2 * 3 / 4])
    assert targets.grad is None


def test_the_gradient_of_the_kl_estimate_is_that_of_the_exact_divergence():
    logits = torch.tensor([0.3, -1.2, 0.8, 2.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([1.0, 0.2, -0.7, 0.1], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    p = logp.detach().exp()
    gradient = {}
    forward = (logp.exp() * (logp - reference)).sum()
    reverse = (reference.exp() * (reference - logp)).sum()
    # over all of the support, each token as often as pi samples it
    estimate = sum(p[k] * losses.kl_to_reference(logp[k : k + 1], reference[k : k + 1], num_answers=1)[0] for k in range(4))
    value_alone = (p * (torch.exp(reference - logp) - (reference - logp) - 1)).sum()
    for name, loss in (("exact", forward), ("reverse", reverse), ("ours", estimate), ("k3", value_alone)):
        (gradient[name],) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert estimate.item() == pytest.approx(forward.item(), abs=1e-12)
    assert torch.allclose(gradient["ours"], gradient["exact"], rtol=0, atol=1e-12)
    assert torch.allclose(gradient["k3"], gradient["reverse"], rtol=0, atol=1e-12)  # the wrong variant
    assert (gradient["k3"] - gradient["exact"]).abs().max() > 0.1


def test_a_gaussian_histogram_by_hand():
    """Three bins of width 2 around a target on the middle one's centre: +-1 deviation lies in it, +-3 in all."""
    one, three = 0.6826894921370859, 0.9973002039367398
    found = losses.gaussian_histogram(
        torch.tensor([5.0], dtype=torch.float64), torch.tensor([2.0, 4.0, 6.0, 8.0]), deviation=1.0
    )
    assert found[0].tolist() == pytest.approx([(three - one) / 2 / three, one / three, (three - one) / 2 / three])
    ends = losses.gaussian_histogram(torch.tensor([-9.0, 99.0]), torch.tensor([2.0, 4.0, 6.0, 8.0]), deviation=1.0)
    assert ends.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert ends[0, 0] > 0.9
    assert ends[1, 2] > 0.9


def test_the_expectation_of_a_gaussian_histogram_is_its_target():
    edges = torch.linspace(-1, 1, 41, dtype=torch.float64)
    centres = (edges[1:] + edges[:-1]) / 2
    targets = torch.linspace(-0.8, 0.8, 33, dtype=torch.float64)
    found = losses.gaussian_histogram(targets, edges, deviation=0.75 * 0.05)
    assert (found @ centres - targets).abs().max() < 1e-3  # a bin is 0.05 wide
    nearest = torch.nn.functional.one_hot((targets[:, None] - centres).abs().argmin(1), 40).double()
    assert (nearest @ centres - targets).abs().max() > 0.02  # one-hot targets are off by up to half a bin


def test_the_gradient_of_the_histogram_error_leads_to_the_target():
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    loss, _ = losses.histogram_error(logits, wanted, num_values=2)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4) / 2)
    assert logits.grad[0].tolist() == pytest.approx([0.15 / 2, 0.05 / 2, -0.05 / 2, -0.15 / 2])  # softmax minus target
    assert wanted.grad is None
    exact = wanted.detach().log().requires_grad_()
    losses.histogram_error(exact, wanted, num_values=1)[0].backward()
    assert exact.grad.abs().max() < 1e-12
