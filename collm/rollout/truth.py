"""Counterfactual truth about an answer: the return of playing on after it, minus that of playing on after other answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from collm.engines.base import Engine
from collm.rollout.live import Stop
from collm.rollout.plan import Plan
from collm.rollout.replay import MISMATCH, Branch, other_answers, play_on
from collm.types import Episode


@dataclass(frozen=True, slots=True)
class Truth:
    """Counterfactual truth about one answer, in units of return.

    Example: Truth((0.5, 0.25)).mean == 0.375
    """

    differences_K: tuple[float, ...] = ()
    """(K,) return-to-go after the answer given minus return-to-go after another answer of the agent; empty if unknown."""
    unknown: str = ""
    """The reason why it is unknown: `MISMATCH`, or the failure of a play."""

    @property
    def mean(self) -> float:
        return sum(self.differences_K) / len(self.differences_K)


def truths(
    plan: Plan,
    engine: Engine,
    wanted: Sequence[tuple[Episode, int, str]],
    plays: int,
    *,
    gamma: float,
    stop: Stop = lambda: None,
) -> list[Truth]:
    """Counterfactual truth about the answers of (episode, turn, agent), with the team that `engine` holds.

        A_i(h, a) = E[G | h, a] - E_{a' ~ pi_i}[G | h, (a_-i, a')]

    Both expectations are means over K = `plays` episodes. The K answers a' are drawn from the agent's own history and each is
    played on once; one with the text of the given answer counts like any other. The k-th plays after both share their random
    numbers. The team-mates' answers of the turn are the recorded ones.
    G is the discounted return-to-go; a truncated episode is not bootstrapped.

    Source: COMA's counterfactual advantage, arXiv:1705.08926, eq. 4, by Monte Carlo instead of Q.
    """
    found = other_answers(plan, engine, wanted, plays, "counterfactual truth")
    at: dict[tuple[int, int], int] = {}
    branches: list[Branch] = []
    for episode, t, _ in wanted:
        if (id(episode), t) not in at:
            at[id(episode), t] = len(branches)
            branches.append(Branch(episode, t, {}, range(plays)))
    first = len(branches)
    branches += [
        Branch(episode, t, {agent: answer}, (k,))
        for (episode, t, agent), answers in zip(wanted, found, strict=True)
        for k, answer in enumerate(answers)
    ]
    played = play_on(plan, engine, branches, stop=stop)
    known = []
    for m, (episode, t, _) in enumerate(wanted):
        others = played[first + m * plays : first + (m + 1) * plays]
        error = next((answer.error for answer in found[m] if answer.finish_reason == "error"), "")
        known.append(_truth(played[at[id(episode), t]], [play for own in others for play in own], error, plays, gamma))
    return known


def _truth(given: Sequence[Episode], others: Sequence[Episode], error: str, plays: int, gamma: float) -> Truth:
    if not given or len(others) < plays:
        return Truth(unknown=error or MISMATCH)
    if failure := error or next((play.failure for play in (*given, *others) if play.failure), ""):
        return Truth(unknown=failure)
    returns = [return_to_go(play, play.own_from, gamma) for play in given]
    if len(returns) < plays:  # the turn was the last one
        returns *= plays
    return Truth(tuple(a - return_to_go(b, b.own_from, gamma) for a, b in zip(returns, others, strict=True)))


def return_to_go(episode: Episode, turn: int, gamma: float) -> float:
    """Discounted sum of the joint rewards from a turn on."""
    return sum(gamma**k * after.reward for k, after in enumerate(episode.turns[turn:]))
