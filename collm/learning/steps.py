"""Shared by all parts: learning rates, optimizer steps, and checks for numbers that are not finite."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from collm.algorithms.advantages import discounted_returns
from collm.errors import TrainingError
from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.models.critic import Head
from collm.models.split import is_split, whole
from collm.settings.rooms import Config, LearnerSettings


def make_optimizer(groups: Iterable[tuple[Iterable[nn.Parameter], float]]) -> torch.optim.AdamW:
    """AdamW without weight decay, with one learning rate per group of parameters."""
    parts = [{"params": list(parameters), "lr": lr, "full_lr": lr} for parameters, lr in groups]
    return torch.optim.AdamW(parts, weight_decay=0.0, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, config: Config, iteration: int) -> None:
    """Set the learning rates of an iteration. They depend on its number alone, so no schedule state is saved."""
    done = iteration / config.run.iterations
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.learner.schedule]
    for group in optimizer.param_groups:
        group["lr"] = group["full_lr"] * factor


def step(optimizer: torch.optim.Optimizer, label: str, iteration: int, settings: LearnerSettings) -> float:
    """Clip the gradient and take a step; returns the norm before clipping. Raises TrainingError if that is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip(parameters, settings.clip_norm or math.inf)
    if not math.isfinite(norm):
        raise TrainingError(
            f"iteration {iteration}: the gradient of {label} is {norm}; no step was taken. The last checkpoint is intact: "
            "start a new run with a lower learning rate."
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


@torch.no_grad()
def clip(parameters: Sequence[nn.Parameter], limit: float) -> float:
    """Scale the gradient to a norm of at most `limit`; returns its norm before. Parameters of a split model have a norm over
    all processes."""
    split = [parameter for parameter in parameters if is_split(parameter)]
    if not split:
        return float(nn.utils.clip_grad_norm_(parameters, limit))
    own = [parameter for parameter in parameters if not is_split(parameter)]
    norms = [whole(nn.utils.get_total_norm([p.grad for p in some if p.grad is not None])) for some in (split, own)]
    norm = math.hypot(*(norm.item() for norm in norms))
    factor = min(1.0, limit / (norm + 1e-6))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
    return norm


@torch.no_grad()
def retreat(optimizer: torch.optim.AdamW, moved: Collection[nn.Parameter], fraction: float) -> None:
    """Take back a fraction of the last step of the parameters in `moved`, which is computed again from the optimizer's state;
    the state is unchanged.

        theta <- theta + fraction lr m / (sqrt(v) + eps),   m, v: AdamW's moments with bias correction, no weight decay

    Source: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1.
    """
    chosen = set(map(id, moved))
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            if id(parameter) in chosen:
                state = optimizer.state[parameter]
                num = float(state["step"])
                mean, square = state["exp_avg"] / (1 - beta1**num), state["exp_avg_sq"] / (1 - beta2**num)
                parameter.addcdiv_(mean, square.sqrt() + group["eps"], value=fraction * group["lr"])


def good_answers(batch: Batch, credit: Credit, *, gamma: float) -> Tensor:
    """(E, N, T) bool: answers whose return-to-go is at least the mean of its turn, and whose advantage is at least the mean of
    its agent, over the iteration.

    All answers are good where all earned the same. With a rounding error of 1e-6 of the largest number.
    """
    played_ET, live_ENT = batch.played_ET.double(), batch.live_ENT.double()
    returns_ET, advantages_ENT = discounted_returns(batch.rewards_ET, gamma=gamma).double(), credit.advantages_ENT.double()
    expected_T = (returns_ET * played_ET).sum(0) / played_ET.sum(0).clamp_min(1)
    expected_N1 = (advantages_ENT * live_ENT).sum((0, 2))[:, None] / live_ENT.sum((0, 2))[:, None].clamp_min(1)
    slack, slack_ENT = 1e-6 * returns_ET.abs().max(), 1e-6 * advantages_ENT.abs().max()
    earned_ET, better_ENT = returns_ET >= expected_T - slack, advantages_ENT >= expected_N1 - slack_ENT
    return earned_ET[:, None] & better_ENT & batch.live_ENT.bool()


def zero_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set every gradient to zero: a step then moves by momentum alone, as after a backward pass of a loss without slope."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)


def rescale(head: Head, agent: str, batch: Batch, credit: Credit, config: Config) -> None:
    """Fit the head's scale to the targets of the critic of `agent`: running mean and deviation, with target normalization, or
    the bins of a histogram."""
    if config.critic.normalize_targets or config.critic.loss == "hl_gauss":
        n = batch.agents.index(agent)
        head.rescale(credit.targets_ENT[:, n][credit.wanted_ENT[:, n].bool()])


def check_loss(loss: Tensor, label: str, iteration: int, batch: Batch, episodes: Iterable[int]) -> None:
    """Raises TrainingError for a loss that is not finite, with the first episodes of its micro-batch; those of a replay
    have no episodes."""
    if not torch.isfinite(loss):
        named = ", ".join(f"{e} (task {batch.episodes[e].label})" for e in list(episodes)[:8])
        raise TrainingError(
            f"iteration {iteration}: the loss of {label} is {loss.item()} in a micro-batch{named and ' of episodes '}{named}; "
            "no step was taken. The last checkpoint is intact: start a new run with a lower learning rate."
        )


def require_finite(numbers_EX: Tensor, what: str, iteration: int, batch: Batch) -> None:
    """Raises TrainingError for a number that is not finite, with its episode. numbers_EX: (E, X)."""
    bad = (~torch.isfinite(numbers_EX)).any(1).nonzero()[:, 0].tolist()
    if bad:
        episode = batch.episodes[bad[0]]
        raise TrainingError(
            f"iteration {iteration}: a {what} of episode {bad[0]} (task {episode.label}, agents "
            f"{', '.join(episode.agents)}) is not a finite number. Nothing was learned from this iteration."
        )
