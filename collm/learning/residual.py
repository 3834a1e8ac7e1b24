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
from collm.learning.effects import Effects
from collm.learning.features import MetricSource, Source, TextSource, counterfactual_features, features, points_of
from collm.learning.readings import PENALTY, resolve
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
        returns, changes: what the regressions of returns, and those of the difference baseline, read beside the rewards so far:
            "global" (environment metrics), "readings" (of the observations of the view's agents), a user's "module:function"
            in place of `readings.read`, or "none"; None for no such regression.
        effects: the difference baseline follows from learned effects instead of replays.
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
        effects: bool = False,
    ):
        self.everything = MetricSource(metric_names)
        self.texts: dict[str, TextSource] = {}
        rewards = MetricSource(())

        def source(read: str, name: str) -> Source:
            if read in ("global", "none"):
                return self.everything if read == "global" else rewards
            if name not in self.texts:
                reader = resolve("text" if read == "readings" else read, "critic.metrics")
                self.texts[name] = TextSource(reader, None if name == "team" else views[name])
            return self.texts[name]

        self.returns = {}
        for name, agents in views.items() if returns is not None else ():
            found = source(str(returns), name)
            self.returns[name] = View(tuple(agents), found, _regression(found))
        self.changes = ()
        if changes is not None:
            self.changes = tuple(source(changes, name) for name, agents in views.items() for _ in agents)
        self.effects = Effects([a for agents in views.values() for a in agents]) if effects else None
        self.teammates = nn.ModuleList(_regression(found) for found in self.changes)
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
        for name, source in self.texts.items():
            found["readings" if name == "team" else f"readings-{name}"] = source.columns
        if self.effects is not None:
            found["effects"] = self.effects.observers
        return found

    def read(self, batch: Batch) -> Rows:
        """Features of everything that regressions read. Raises TrainingError for a number that is not finite."""
        sources = [
            *(view.source for view in self.returns.values()),
            *self.changes,
            *([self.everything] if self.ceiling else []),
        ]
        points = [point for episode in batch.episodes for point in points_of(episode)]
        for source in set(sources):
            source.collect(points)
        return {source: features(batch, source) for source in dict.fromkeys(sources)}

    def without(self, batch: Batch, agent: str) -> Mapping[tuple[int, int], Counterfactual]:
        """(episode, turn) -> the outcome of the turn without the agent's answer, where it is known."""
        return replayed(batch, agent) if self.effects is None else self.effects.outcomes(batch, agent)


def _regression(source: Source) -> TurnRegression:
    """A regression on the source's numbers and the rewards so far; of readings, which are many, with their own penalty."""
    penalty = {"strength": 0.0, "per_feature": PENALTY} if isinstance(source, TextSource) else {}
    return TurnRegression(2 + source.width, TURNS, **penalty)


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
    """(episode, turn) -> outcome of the replayed turn with the agent's answer empty, where the replay repeated the record."""
    return {
        (e, t): turn.no_op[agent]
        for e, episode in enumerate(batch.episodes)
        for t, turn in enumerate(episode.turns)
        if agent in turn.no_op and turn.no_op[agent].matches
    }


def teammates_changes(batch: Batch, rows: Rows, regressions: Regressions) -> tuple[Tensor, Tensor]:
    """(E, N, T, M) change of the features in a turn caused by each agent's team-mates alone, centred over the iteration; and
    (E, N, T) bool where the counterfactual is known."""
    changes, known = [], []
    for agent, source in zip(batch.agents, regressions.changes, strict=True):
        after_ETM, known_ET = counterfactual_features(batch, source, regressions.without(batch, agent))
        changes.append(centred(after_ETM - rows[source][:, :-1], known_ET))
        known.append(known_ET)
    return torch.stack(changes, 1), torch.stack(known, 1)


def predict_teammates(regressions: nn.ModuleList, changes_ENTM: Tensor, known_ENT: Tensor, baselines_ENT: Tensor) -> Tensor:
    """Difference baseline of each answer, (E, N, T) in units of return.

        b_i(h_t, a_-i,t) = b(h_t) + beta . (Delta - mean Delta),   beta: ridge regression of G_t - b(h_t) on Delta

    b is V of a critic, or the baseline of a group method. Where the counterfactual is unknown, b_i = b.

    Delta is what the team-mates' answers alone change in the features of the next observation: replayed, or predicted from
    learned effects. Delta and G - b are centred within the iteration, so that b_i equals b on average. A constant term would
    track the same rise of returns as b, so that correct answers get negative advantages until both settle.

    Subtracting b_i instead of b adds no bias to the gradient of any G: given the histories, answers are drawn independently of
    each other, and nothing in b_i - b depends on agent i's answer of the turn. Delta follows from the history and the
    team-mates' answers; beta, and the counts of learned effects, from earlier iterations alone; the mean of Delta from the
    other episodes besides. So for every return G of the turn, with V fixed before the update: the one-step target, a
    lambda-return, and a return-to-go whose group baseline was subtracted already. What bias G - b has of itself (V that errs in
    a one-step target, `group_max`) stays.

    Args: changes_ENTM: (E, N, T, M) Delta. known_ENT: (E, N, T) bool. baselines_ENT: (E, N, T) b, in units of return.
    Source: Wu et al. 2018, arXiv:1803.07246, section 4; see `algorithms.advantages.difference`.
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
