"""Counterfactual truth on bandits whose truth is known."""

from __future__ import annotations

from statistics import mean

import numpy as np
import pytest
from bandits import WEIGHTS, played, uniform

from collm.engines.scripted import ScriptedEngine
from collm.rollout.replay import MISMATCH
from collm.rollout.truth import return_to_go, truths
from collm.types import Completion, Episode, Turn


@pytest.mark.parametrize("turns", [1, 2])
def test_the_truth_of_an_additive_bandit(turns):
    """The team-mate's answer and the later turns cancel: what is left is the own digit minus 4.5, times the weight."""
    (plan, episodes), plays = played(turns, 4), 100
    wanted = [(episode, 0, agent) for episode in episodes for agent in WEIGHTS]
    found = truths(plan, uniform(), wanted, plays, gamma=1.0)
    for (episode, t, agent), truth in zip(wanted, found, strict=True):
        expected = WEIGHTS[agent] * (int(episode.turns[t].completions[agent].text) - 4.5)
        assert len(truth.differences_K) == plays
        assert truth.mean == pytest.approx(expected, abs=WEIGHTS[agent])  # 3.5 standard errors


def test_only_the_turn_and_what_follows_count_and_are_discounted():
    plan, episodes = played(3, 3)
    for t, gamma in ((2, 0.5), (1, 0.0)):
        for episode in episodes:
            [truth] = truths(plan, uniform(), [(episode, t, "small")], 8, gamma=gamma)
            own = int(episode.turns[t].completions["small"].text)
            assert all(round(own - difference, 9) in range(10) for difference in truth.differences_K)


def test_return_to_go_by_hand():
    turns = [Turn({}, {"a": Completion("a", "")}, reward, reward) for reward in (1.0, 2.0, 4.0)]
    assert return_to_go(Episode(0, 0, ("a",), turns=turns), 1, 0.5) == 2.0 + 0.5 * 4.0
    assert return_to_go(Episode(0, 0, ("a",), turns=turns), 0, 1.0) == 7.0


def test_hidden_randomness_leaves_the_truth_unknown():
    plan, episodes = played(2, 1, hidden=True)
    first, second = truths(plan, uniform(), [(episodes[0], 0, "small"), (episodes[0], 1, "small")], 4, gamma=1.0)
    assert (len(first.differences_K), first.unknown) == (4, "")
    assert (second.differences_K, second.unknown) == ((), MISMATCH)


def test_a_failed_play_leaves_the_truth_unknown():
    plan, episodes = played(2, 2)
    broken = ScriptedEngine(lambda request: "ten" if request.agent == "large" else "3")
    found = truths(plan, broken, [(episodes[0], 0, "large"), (episodes[1], 1, "small")], 4, gamma=1.0)
    assert [truth.unknown for truth in found] == ["step 1: not a digit", ""]


def test_answers_of_one_turn_share_what_follows_the_given_answers():
    """One more agent of a turn costs the plays after its other answers alone."""
    plan, episodes = played(2, 1)
    calls = []

    class Counted(ScriptedEngine):
        def generate(self, requests):
            calls.append(len(requests))
            return super().generate(requests)

    engine = Counted(uniform().answer)
    truths(plan, engine, [(episodes[0], 0, agent) for agent in WEIGHTS], 4, gamma=1.0)
    assert calls == [2 * 4, 2 * (4 + 2 * 4)]


def test_the_planted_wrong_variant_is_not_the_truth():
    """Without the other answers subtracted, the large team-mate's answer swamps the small agent's own."""
    plan, episodes = played(1, 60)
    found = truths(plan, uniform(), [(episode, 0, "small") for episode in episodes], 16, gamma=1.0)
    own = [int(episode.turns[0].completions["small"].text) for episode in episodes]
    wrong = [return_to_go(episode, 0, 1.0) for episode in episodes]
    assert np.corrcoef(own, [truth.mean for truth in found])[0, 1] > 0.95
    assert np.corrcoef(own, wrong)[0, 1] < 0.6
    assert mean(truth.mean for truth in found) == pytest.approx(mean(own) - 4.5, abs=0.4)
