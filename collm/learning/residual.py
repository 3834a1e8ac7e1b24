"""Regressions on features: those of returns, which values are added to or consist of, and those of the difference baseline.

`predict_*` returns predictions and changes nothing; `learn_*` adds an iteration's samples and returns nothing. Samples are
predicted before they are learned from. `features` computes what regressions read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from collm.algorithms.advantages import discounted_returns
from collm.algorithms.regression import MetricCeiling, TurnRegression
from collm.learning.batch import Batch
from collm.learning.features import MetricSource, Source, counterfactual_features, features
from collm.types import Counterfactual

TURNS = 32
"""Number of turns with a separate regression; later turns share the last one."""

Rows = Mapping[Source, Tensor]
"""Source -> its features (E, T + 1, M) of one iteration."""


@dataclass(frozen=True, slots=True)
class View:
    """A regression of returns: what it reads, and the agents whose values it predicts."""

    agents: tuple[str, ...]
    source: Source
    regression: TurnRegression


class Regressions:
    """The regressions of a run.

    Args:
        views: name -> the agents that share a regression; one of all agents is called "team".
        metric_names: the environment metrics.
        critic: whether values are predicted; the metric ceiling is then measured, for reports.
        returns, changes: what the regressions of returns, and those of the difference baseline, read: "global" (environment
            metrics and rewards so far) or "none" (rewards so far); None for no such regression.
    """

    returns: dict[str, View]
    """Name -> the regression of returns of these agents; empty if values are from text alone."""
    teammates: nn.ModuleList
    """For each agent, a regression from what its team-mates' answers alone change to the return minus its baseline; empty
    without the difference baseline."""
    changes: tuple[Source, ...]
    """For each agent, what that regression reads; empty without the difference baseline."""
    ceiling: MetricCeiling | None
    """The metric ceiling; None without a critic."""

    def __init__(
        self,
        views: Mapping[str, Sequence[str]],
        metric_names: Sequence[str],
        *,
        critic: bool,
        returns: str | None = None,
        changes: str | None = None,
    ):
        self.everything = MetricSource(metric_names)
        sources = {"global": self.everything, "none": MetricSource(())}
        self.returns = {}
        if returns is not None:
            source = sources[returns]
            self.returns = {
                name: View(tuple(agents), source, TurnRegression(2 + source.width, TURNS)) for name, agents in views.items()
            }
        self.changes = ()
        if changes is not None:
            self.changes = tuple(sources[changes] for agents in views.values() for _ in agents)
        self.teammates = nn.ModuleList(TurnRegression(2 + source.width, TURNS) for source in self.changes)
        self.ceiling = MetricCeiling(2 + len(metric_names), TURNS) if critic else None

    def modules(self) -> dict[str, nn.Module]:
        """File name -> module of a checkpoint."""
        found: dict[str, nn.Module] = {}
        if self.ceiling is not None:
            found["yardstick"] = self.ceiling
        for name, view in self.returns.items():
            found["regression" if name == "team" else f"regression-{name}"] = view.regression
        if self.teammates:
            found["without"] = self.teammates
        return found

    def read(self, batch: Batch) -> Rows:
        """Features of everything that regressions read. Raises TrainingError for a number that is not finite."""
        sources = [
            *(view.source for view in self.returns.values()),
            *self.changes,
            *([self.everything] if self.ceiling else []),
        ]
        return {source: features(batch, source) for source in dict.fromkeys(sources)}


def predict_returns(views: Mapping[str, View], rows: Rows, batch: Batch, read_ENT: Tensor) -> Tensor:
    """Predicted returns (E, N, T or T + 1) where a critic computes a value; 0 elsewhere, and without a regression."""
    predicted_ENT = torch.zeros_like(read_ENT)
    for view in views.values():
        chosen = [batch.agents.index(agent) for agent in view.agents]
        predicted_ET = view.regression(rows[view.source][:, : read_ENT.shape[-1]])
        predicted_ENT[:, chosen] = torch.where(read_ENT[:, chosen].bool(), predicted_ET[:, None], predicted_ENT[:, chosen])
    return predicted_ENT


def learn_returns(
    views: Mapping[str, View],
    rows: Rows,
    batch: Batch,
    values_ENT: Tensor,
    read_ENT: Tensor,
    *,
    gamma: float,
    kind: str,
) -> None:
    """Add this iteration's returns to the regressions.

    The return of a truncated episode is bootstrapped with V of its final history, the mean over the agents of the regression;
    for Q such an episode is left out.
    """
    for view in views.values():
        rewards_ET, counted_ET = batch.rewards_ET, batch.complete_ET
        if kind == "V":
            chosen = [batch.agents.index(agent) for agent in view.agents]
            speaking_ENT = read_ENT[:, chosen, 1:]
            following_ET = (values_ENT[:, chosen, 1:] * speaking_ENT).sum(1) / speaking_ENT.sum(1).clamp_min(1)
            rewards_ET = rewards_ET + gamma * following_ET * (batch.last_ET & batch.truncated_E[:, None])
            counted_ET = batch.played_ET
        returns_ET = discounted_returns(rewards_ET, gamma=gamma)
        view.regression.learn(rows[view.source][:, :-1], returns_ET, counted_ET)


def replayed(batch: Batch, agent: str) -> dict[tuple[int, int], Counterfactual]:
    """(episode, turn) -> outcome of the replayed turn with the agent's answer empty, where it is known."""
    return {
        (e, t): turn.no_op[agent]
        for e, episode in enumerate(batch.episodes)
        for t, turn in enumerate(episode.turns)
        if agent in turn.no_op
    }


def teammates_changes(batch: Batch, rows: Rows, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
    """(E, N, T, M) change of the features in a turn caused by each agent's team-mates alone, centred over the iteration; and
    (E, N, T) bool where the counterfactual is known. sources: (N,) what each agent's regression reads."""
    changes, known = [], []
    for agent, source in zip(batch.agents, sources, strict=True):
        after_ETM, known_ET = counterfactual_features(batch, source, replayed(batch, agent))
        changes.append(centred(after_ETM - rows[source][:, :-1], known_ET))
        known.append(known_ET)
    return torch.stack(changes, 1), torch.stack(known, 1)


def predict_teammates(regressions: nn.ModuleList, changes_ENTM: Tensor, known_ENT: Tensor, baselines_ENT: Tensor) -> Tensor:
    """Difference baseline of each answer, (E, N, T) in units of return.

        b_i(h_t, a_-i,t) = b(h_t) + beta . (Delta - mean Delta),   beta: ridge regression of G_t - b(h_t) on Delta

    b is V of a critic, or the baseline of a group method. Where the counterfactual is unknown, b_i = b.

    Delta is the change of the environment metrics by the team-mates' answers alone and does not depend on agent i's answer: see
    `algorithms.advantages.difference`. Delta and G - b are centred within the iteration, so that b_i equals b on average. A
    constant term would track the same rise of returns as b, so that correct answers get negative advantages until both settle.

    Args: changes_ENTM: (E, N, T, M) Delta. known_ENT: (E, N, T) bool. baselines_ENT: (E, N, T) b, in units of return.
    """
    baselines_ENT = baselines_ENT.clone()
    for n, regression in enumerate(regressions):
        baselines_ENT[:, n] += torch.where(known_ENT[:, n], regression(changes_ENTM[:, n]), 0.0)
    return baselines_ENT


def learn_teammates(
    regressions: nn.ModuleList, changes_ENTM: Tensor, known_ENT: Tensor, baselines_ENT: Tensor, returns_ENT: Tensor
) -> None:
    """Add this iteration's samples: centred G - b against Delta, as in `predict_teammates`. returns_ENT: (E, N, T) G."""
    for n, regression in enumerate(regressions):
        left_ET = centred((returns_ENT[:, n] - baselines_ENT[:, n])[..., None], known_ENT[:, n])[..., 0]
        assert isinstance(regression, TurnRegression)
        regression.learn(changes_ENTM[:, n], left_ET, known_ENT[:, n])


def centred(numbers_ETM: Tensor, chosen_ET: Tensor) -> Tensor:
    """Numbers (E, T, M) minus their mean over the chosen episodes of each turn; 0 where not chosen."""
    chosen_ET1 = chosen_ET[..., None]
    kept_ETM = torch.where(chosen_ET1, numbers_ETM, 0.0)  # unchosen numbers may be NaN
    return kept_ETM - chosen_ET1 * kept_ETM.sum(0) / chosen_ET1.sum(0).clamp_min(1)
