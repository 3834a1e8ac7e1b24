"""Seeds are functions of their keys; records keep what was seen, written and earned."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import random

import numpy as np
import pytest

from collm import seeds
from collm.types import Completion, Episode, Message, Sampling, Turn

# --- seeds ---------------------------------------------------------------------------------------------------------------


def test_a_seed_is_the_same_in_every_process_and_version():
    """Recomputed from its definition: BLAKE2b, 8 bytes, of the keys as written in Python; the top 63 bits. A change breaks
    every resumed run."""
    digest = hashlib.blake2b(b"(3, 'episode', 17)", digest_size=8).digest()
    assert seeds.derive(3, "episode", 17) == int.from_bytes(digest, "big") // 2


def test_every_key_its_type_and_its_place_matter():
    variants = [(1, 2), (2, 1), (12,), (1, "2"), ("1", 2), ("1", "2"), (1, 2, ""), (1,), (), ("",), (1, -2), ("12",)]
    assert len({seeds.derive(*keys) for keys in variants}) == len(variants)


def test_keys_cannot_run_into_each_other():
    """ "A 63-bit seed that depends on every key": an agent's name may hold any character."""
    assert seeds.derive("a", "b") != seeds.derive("a\x1fstr:b")


def test_seeds_fit_63_bits_and_do_not_collide():
    drawn = {seeds.derive(0, "episode", iteration, index) for iteration in range(100) for index in range(200)}
    assert len(drawn) == 20_000
    assert min(drawn) >= 0
    assert max(drawn) < 1 << 63
    assert max(drawn) > 1 << 62  # all 63 bits are in use


def test_streams_are_independent_of_each_other_and_of_the_global_state():
    random.seed(1)
    first = [seeds.stream(5, "env").random() for _ in range(3)]
    random.seed(2)
    assert [seeds.stream(5, "env").random() for _ in range(3)] == first
    assert len(set(first)) == 1
    assert seeds.stream(5, "env").random() != seeds.stream(6, "env").random()


# --- histories -----------------------------------------------------------------------------------------------------------


def completion(agent, text, ids=None):
    return Completion(agent, text, token_ids=None if ids is None else np.asarray(ids, dtype=np.int32))


def episode():
    """Two agents, three turns; agent b is gone after the first."""
    made = Episode(task=4, seed=9, agents=("a", "b"), observations={"a": "a0", "b": "b0"})
    made.add([completion("a", "x0", [5, 6]), completion("b", "y0", [7])], {"a": "a1"}, *ends({"a": 1.0, "b": 1.0}, b=True))
    made.add([completion("a", "x1", [8])], {"a": "a2"}, *ends({"a": 2.0}))
    made.add([completion("a", "x2", [9, 9, 9])], {"a": "a3"}, *ends({"a": 3.0}, a=True))
    return made


def ends(rewards, *, infos=None, truncated=(), **terminated):
    return rewards, {k: terminated.get(k, False) for k in rewards}, {k: k in truncated for k in rewards}, infos or {}


def texts(messages):
    return [(m.role, m.text) for m in messages]


def test_a_full_history_is_all_an_agent_saw_and_wrote_and_nothing_else():
    made = episode()
    assert texts(made.history("a")) == [
        ("user", "a0"),
        ("assistant", "x0"),
        ("user", "a1"),
        ("assistant", "x1"),
        ("user", "a2"),
        ("assistant", "x2"),
        ("user", "a3"),
    ]
    assert [m.token_ids.tolist() for m in made.history("a") if m.role == "assistant"] == [[5, 6], [8], [9, 9, 9]]
    assert all(m.token_ids is None for m in made.history("a") if m.role == "user")
    assert "b0" not in str(made.history("a"))
    assert "y0" not in str(made.history("a"))


def test_a_last_history_keeps_instruction_last_answer_and_newest_observation():
    made = episode()
    assert texts(made.history("a", "last")) == [("user", "a0"), ("assistant", "x2"), ("user", "a3")]
    made.turns, made.observations = made.turns[:1], {"a": "a1"}
    assert made.history("a", "last") == made.history("a", "full")
    made.turns, made.observations = [], {"a": "a0"}
    assert texts(made.history("a", "last")) == [("user", "a0")]


# --- what a turn leaves --------------------------------------------------------------------------------------------------


def test_the_joint_reward_is_the_mean_over_those_who_acted():
    made = Episode(0, 0, ("a", "b"), observations={"a": "", "b": ""})
    made.add([completion("a", ""), completion("b", "")], {}, *ends({"a": 1.0, "b": 4.0}, a=True, b=True))
    assert made.turns[0].reward == 2.5
    assert made.turns[0].raw_reward == 2.5  # a world that reports none has no shift
    made = Episode(0, 0, ("a", "b"), observations={"a": "", "b": ""})
    made.add([completion("a", "")], {}, *ends({"a": 1.0, "b": 99.0}, a=True))
    assert made.turns[0].reward == 1.0


def test_infos_give_raw_reward_parts_and_metrics():
    made = Episode(0, 0, ("a",), observations={"a": ""}, state="s0")
    info = {"raw_reward": 0.5, "reward_parts": {"match": 0.5}, "metrics": {"m": 3.0}}
    made.add([completion("a", "")], {"a": "o1"}, *ends({"a": -1.5}, infos={"a": info}), state="s1")
    turn = made.turns[0]
    assert (turn.reward, turn.raw_reward, turn.parts, turn.state) == (-1.5, 0.5, {"match": 0.5}, "s0")
    assert (made.state, made.metrics, made.score) == ("s1", {"m": 3.0}, 0.5)
    made.add([completion("a", "")], {}, *ends({"a": 1.0}, infos={"a": {"raw_reward": 2.0}}, a=True))
    assert made.metrics == {"m": 3.0}  # a turn that reports none leaves the last ones
    assert made.score == 2.0


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        ({"a": True, "b": True}, (), (True, False)),
        ({"a": True, "b": False}, (), (False, False)),
        ({"a": False, "b": False}, ("a", "b"), (False, True)),
        ({"a": True, "b": False}, ("b",), (False, True)),
        ({"a": False, "b": False}, ("a",), (False, False)),
    ],
)
def test_an_episode_is_over_when_nobody_goes_on(terminated, truncated, expected):
    made = Episode(0, 0, ("a", "b"), observations={"a": "", "b": ""})
    made.add([completion("a", ""), completion("b", "")], {}, *ends({"a": 0.0, "b": 0.0}, truncated=truncated, **terminated))
    assert (made.terminated, made.truncated) == expected


def test_only_an_episodes_own_tokens_count():
    made = episode()
    assert made.num_tokens() == 2 + 1 + 1 + 3
    made.own_from = 2
    assert made.num_tokens() == 3
    made.turns[2].completions["a"] = completion("a", "scripted")
    assert made.num_tokens() == 0


def test_an_episode_without_turns_has_no_score():
    assert math.isnan(Episode(0, 0, ("a",)).score)


def test_records_that_travel_cannot_be_changed():
    for record, name in ((Message("user", "x"), "text"), (Sampling(), "temperature"), (Completion("a", "x"), "text")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, "other")


def test_defaults_are_not_shared_between_records():
    one, other = Turn({}, {}, 0.0, 0.0), Turn({}, {}, 0.0, 0.0)
    one.parts["x"] = 1.0
    one.metrics["a"] = 1.0
    assert other.parts == other.metrics == {}
    assert Episode(0, 0, ()).turns is not Episode(0, 0, ()).turns
