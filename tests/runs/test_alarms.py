"""Alarms: each is raised by what it is about, by nothing else, once, and reads as one sentence with its number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pettingzoo import ParallelEnv
from worlds import Echo

from collm.envs.catalogue import make
from collm.runs.alarms import PREFIX, RULES, Alarms, answer_metrics, recorded, sentence
from collm.types import Completion, Episode, Turn

FIRST = {"iteration": 1, "reward/raw": 0.5, "a/entropy_estimate": 2.0, "answer_tokens": 20.0, "answers_rejected": 0.1}


def episode(observations: dict[str, str], answers: dict[str, str], **metrics: float) -> Episode:
    written = {agent: Completion(agent, text, token_ids=np.arange(len(text.split()))) for agent, text in answers.items()}
    found = Episode(0, 0, tuple(answers), turns=[Turn(observations, written, 0.0, 0.0)])
    found.metrics = metrics
    return found


@pytest.mark.parametrize(
    ("record", "raised", "shown"),
    [
        ({"a/zero_advantages": 0.6}, "a/zero_advantages", "60% of the answers of a have advantage 0"),
        ({"a/zero_advantages": 0.5}, None, ""),
        ({"a/entropy_estimate": 0.19, "reward/raw": 0.5}, "a/entropy_estimate", "the entropy of a fell to 0.190 nats"),
        ({"a/entropy_estimate": 0.19, "reward/raw": 0.6}, None, ""),  # it learned
        ({"a/entropy_estimate": 0.21, "reward/raw": 0.1}, None, ""),
        ({"answer_tokens": 3.9, "reward/raw": 0.4}, "answer_tokens", "answers shrank to 3.9 tokens"),
        ({"answer_tokens": 3.9, "reward/raw": 0.9}, None, ""),
        ({"answers_repeated": 0.75, "reward/raw": 0.2}, "answers_repeated", "the same answer to 75% of the different tasks"),
        ({"answers_repeated": 0.75, "reward/raw": 0.6}, None, ""),
        ({"answers_rejected": 0.9}, None, ""),  # only the first iteration's
        ({"b/logprob_gap_mean": 0.06}, "b/logprob_gap_mean", "the engine's log-probs of b differ from the learner's by 0.060"),
        ({"b/logprob_gap_mean": 0.04, "b/logprob_gap_max": 3.0}, None, ""),
        ({"unfiltered_vocabulary": 49152}, "unfiltered_vocabulary", "all 49,152 tokens of the vocabulary"),
        ({"unfiltered_vocabulary": 1536}, None, ""),
        ({"evaluation/repetition": 0.6}, "evaluation/repetition", "0.60, above 0.5: answers repeat themselves"),
        ({"evaluation/source_words": 0.05}, "evaluation/source_words", "0.05, below 0.1: answers have nothing to do"),
        ({"evaluation/repetition": 0.5, "evaluation/source_overlap": 0.9, "evaluation/source_words": 0.1}, None, ""),
        ({"a/entropy_estimate": float("nan"), "answer_tokens": float("nan"), "a/loss": 9.0}, None, ""),
    ],
)
def test_each_alarm_is_raised_by_its_own_metric(record: dict[str, Any], raised: str | None, shown: str) -> None:
    alarms = Alarms([FIRST])
    found = alarms.raised({"iteration": 7, **record})
    assert list(found) == ([raised] if raised else [])
    if raised:
        assert shown in sentence(raised, found[raised])
        assert alarms.raised({"iteration": 7, **record, PREFIX + raised: found[raised]}) == {}, "raised once"


def test_rejected_answers_are_an_alarm_of_the_first_iteration() -> None:
    record = {"iteration": 1, "answers_rejected": 0.8}
    assert Alarms([{"iteration": 0}]).raised(record) == {"answers_rejected": 0.8}
    assert "rejected 80% of what the first iteration's answers hold" in sentence("answers_rejected", 0.8)


def test_advantages_of_the_first_iteration_may_be_zero() -> None:
    """A new critic's values are 0, so answers without reward have advantage 0."""
    assert Alarms([{"iteration": 0}]).raised({"iteration": 1, "a/zero_advantages": 0.7}) == {}
    assert Alarms([FIRST]).raised({"iteration": 2, "a/zero_advantages": 0.7}) == {"a/zero_advantages": 0.7}


def test_before_training_held_out_answers_raise_nothing() -> None:
    assert Alarms().raised({"iteration": 0, "evaluation/repetition": 0.9}) == {}


def test_a_resumed_run_raises_no_alarm_again_and_compares_with_the_same_first_values() -> None:
    records = [FIRST, {"iteration": 2, "reward/raw": 0.4, "answer_tokens": 2.0, f"{PREFIX}answer_tokens": 2.0}]
    later = {"iteration": 3, "reward/raw": 0.4, "answer_tokens": 1.9, "a/entropy_estimate": 0.1}
    assert Alarms(records).raised(later) == {"a/entropy_estimate": 0.1}
    assert recorded(records) == [f"warning after iteration 2: {sentence('answer_tokens', 2.0)}"]


@pytest.mark.parametrize(
    ("rewards", "raised"),
    [
        ([0.2, 0.9, 0.9, 0.9, 0.5, 0.5], 6),  # means of three: 0.67, 0.9, 0.77, 0.63
        ([0.2, 0.9, 0.9, 0.9, 0.0, 0.9, 0.9, 0.9], 5),  # 0.6 in the iteration of the fall
        ([0.2, 0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.5, 0.9], None),  # never below 0.85 of the best
        ([0.9, 0.0], None),  # fewer than three
        ([-1.0, -1.0, -1.0, -9.0, -9.0, -9.0], None),  # a fraction of a negative number has no meaning
        ([1.0, 2.0, 3.0, 2.0, 1.0, 1.0], 6),
    ],
)
def test_a_fall_of_the_training_reward_below_three_quarters_of_its_best_mean_of_three(
    rewards: list[float], raised: int | None
) -> None:
    alarms = Alarms([{"iteration": 0}])
    found = [i for i, r in enumerate(rewards, 1) if "reward_kept" in alarms.raised({"iteration": i, "reward/raw": r})]
    assert found == ([raised] if raised else [])
    for done in range(1, len(rewards)):  # a resumed run raises what the uninterrupted one does
        again = Alarms([{"iteration": i, "reward/raw": r} for i, r in enumerate(rewards[:done], 1)])
        later = [i for i, r in enumerate(rewards[done:], done + 1) if again.raised({"iteration": i, "reward/raw": r})]
        assert later[:1] == [max(raised, done + 1)] if raised and raised > done else True


def test_the_mean_value_outside_the_range_of_all_returns_so_far() -> None:
    alarms = Alarms([{"iteration": 0}])
    assert alarms.raised({"iteration": 1, "critic/value": -1.0, "return_lowest": 0.2, "return_highest": 0.4}) == {}, "is new"
    assert alarms.raised({"iteration": 2, "critic/value": 1.15, "return_lowest": 0.5, "return_highest": 1.0}) == {}
    solved = {"iteration": 3, "return_lowest": 1.0, "return_highest": 1.0}  # the range is that of the run: 0.2 to 1
    assert alarms.raised({**solved, "critic/value": 1.15}) == {}
    found = alarms.raised({**solved, "critic/value": 1.4, "a/critic/value": 0.0})
    assert found == {"critic/value_outside": pytest.approx(0.5), "a/critic/value_outside": pytest.approx(0.25)}
    assert "the mean value of a/critic is outside" in sentence("a/critic/value_outside", 0.25)
    assert "by 25% of its width" in sentence("critic/value_outside", 0.25)


def test_each_sentence_names_its_number_and_a_way_out() -> None:
    for rule in RULES:
        text = sentence(f"x/{rule.metric}", 0.875)
        assert any(number in text for number in ("88%", "0.88", "0.875", "0.9", "1 tokens")), text
        assert any(word in text for word in ("Set ", "raise ", "Lower ", "Read ", "lower ", "See ")), text


def test_what_is_said_about_answers_by_hand() -> None:
    """Two agents on four tasks: a repeats one answer on three of them, b never does; 3 of 8 are rejected."""
    episodes = [
        episode(
            {"a": f"task {n}", "b": f"task {n}"}, {"a": "red" if n else "blue green", "b": f"{n}"}, rejected=float(n == 1) * 3
        )
        for n in range(4)
    ]
    found = answer_metrics(episodes, make("agree"))
    assert found == {"answer_tokens": 9 / 8, "answers_repeated": 0.75, "answers_rejected": 3 / 8}
    alike = [episode({"a": "task"}, {"a": "red"}) for _ in range(9)]
    assert answer_metrics(alike, make("agree")) == {"answer_tokens": 1.0}  # one task, asked nine times


def test_rejected_parts_are_counted_per_part_as_the_environment_defines_it() -> None:
    built = [episode({"a": "x"}, {"a": "1 0 0\n1 1 0\n1 2 0\n1 3 0"}, rejected=2.0)]
    assert answer_metrics(built, make("str_build"))["answers_rejected"] == 0.5
    code = [episode({"a": "x"}, {"a": "def f():\n  return"}, rejected=1.0)]
    assert answer_metrics(code, make("coop_code"))["answers_rejected"] == 1
    nothing = [episode({"a": "x"}, {"a": "no object"}, rejected=1.0)]
    assert answer_metrics(nothing, make("bridge_build"))["answers_rejected"] == 1  # no part, which counts as one


def test_no_fraction_is_computed_where_the_number_of_parts_is_unknown() -> None:
    played = [episode({"a": "x"}, {"a": "1\n2"}, rejected=1.0)]
    unknown: tuple[Any, ...] = (Echo(), ParallelEnv())  # without the method, and not a TextEnv
    for env in unknown:
        assert answer_metrics(played, env) == {"answer_tokens": 2.0}
