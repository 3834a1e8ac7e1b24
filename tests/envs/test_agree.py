"""`agree`: every joint answer of small games is enumerated."""

from __future__ import annotations

import itertools

import pytest

from collm import make
from collm.envs.agree import COLOURS, Agree
from collm.errors import ConfigError, EnvError


def play_once(env, answers, task=0):
    observations, _ = env.reset(seed=0, options={"task": task})
    return observations, env.step(dict(zip(env.possible_agents, answers, strict=True)))


@pytest.mark.parametrize(("agents", "colours"), [(2, 2), (2, 4), (3, 3), (4, 2)])
def test_uniform_play_returns_k_to_the_minus_n_minus_one(agents, colours):
    env = Agree(wording="terse", agents=agents, colours=colours)
    rewards = [play_once(env, a)[1][1] for a in itertools.product(COLOURS[:colours], repeat=agents)]
    assert all(len(set(r.values())) == 1 for r in rewards)  # joint
    assert sum(r["agent_0"] for r in rewards) / len(rewards) == pytest.approx(colours ** -(agents - 1))
    assert sum(r["agent_0"] for r in rewards) == colours  # exactly the unanimous ones


@pytest.mark.parametrize(
    ("answers", "reward", "rejected"),
    [
        (("red", "red"), 1, 0),
        (("red", "blue"), 0, 0),
        (("I say RED!", "red, of course"), 1, 0),
        (("red or blue", "blue or red"), 0, 0),  # the first colour counts
        (("red or blue", "red"), 1, 0),
        (("redder", "redder"), 0, 2),  # no whole word
        (("", ""), 0, 2),  # two silent agents do not agree
        (("brown", "brown"), 0, 2),  # the seventh colour, with four in play
        (("red", "no idea"), 0, 1),
        (("green\x00", "\ngreen"), 1, 0),
    ],
)
def test_rewards_by_hand(answers, reward, rejected):
    _, (_, rewards, terminations, truncations, infos) = play_once(Agree(wording="terse"), answers)
    assert rewards == {"agent_0": reward, "agent_1": reward}
    for agent in rewards:
        assert infos[agent]["raw_reward"] == reward
        assert infos[agent]["reward_parts"] == {"match": reward}
        assert infos[agent]["metrics"] == {"match": reward, "rejected": rejected}
    assert set(terminations.values()) == {True}
    assert set(truncations.values()) == {False}


def test_alone_the_target_is_told_and_counts():
    env = Agree(wording="terse", agents=1, colours=4)
    assert env.num_tasks == 4
    for task, target in enumerate(COLOURS[:4]):
        assert env.task_name(task) == target
        rewards = []
        for colour in COLOURS[:4]:
            observations, step = play_once(env, [colour], task)
            assert f"Name the colour {target}." in observations["agent_0"]
            rewards.append(step[1]["agent_0"])
        assert rewards == [float(colour == target) for colour in COLOURS[:4]]


def test_several_turns_end_on_the_last_and_pay_each():
    env = Agree(wording="terse", turns=3)
    env.reset(seed=1, options={"task": 0})
    paid = []
    for turn, (a, b) in enumerate([("red", "red"), ("red", "blue"), ("pink red", "red")]):
        assert env.agents == ["agent_0", "agent_1"]
        _, rewards, terminations, truncations, _ = env.step({"agent_0": a, "agent_1": b})
        paid.append(rewards["agent_0"])
        assert set(terminations.values()) == {turn == 2}
        assert set(truncations.values()) == {False}
    assert paid == [1, 0, 1]
    assert env.agents == []
    with pytest.raises(EnvError, match="reset"):
        env.step({"agent_0": "red", "agent_1": "red"})


def test_feedback_tells_the_outcome_and_not_the_other_answer():
    for answers in (("red", "blue"), ("red", "green"), ("red", "nonsense")):
        _, (observations, *_) = play_once(Agree(wording="terse", turns=2), answers)
        assert observations["agent_0"] == "That did not score. Again."
    _, (observations, *_) = play_once(Agree(wording="terse", turns=2), ("red", "red"))
    assert observations["agent_0"] == "That scored. Again."


def test_a_missing_answer_is_named():
    env = Agree(wording="terse", agents=["ann", "bob"])
    env.reset(seed=0)
    with pytest.raises(EnvError, match="bob"):
        env.step({"ann": "red"})


def test_a_task_that_does_not_exist_is_refused():
    for task in (-1, 1, 99):
        with pytest.raises(EnvError, match="does not exist"):
            Agree(wording="terse").reset(seed=0, options={"task": task})


def test_tasks_are_drawn_from_the_seed():
    env = Agree(wording="terse", agents=1, colours=8)

    def drawn(seed):
        env.reset(seed=seed)
        return env.task

    assert [drawn(s) for s in range(30)] == [drawn(s) for s in range(30)]
    assert {drawn(s) for s in range(200)} == set(range(8))


@pytest.mark.parametrize(
    "options",
    [
        {"agents": 0},
        {"agents": -1},
        {"agents": ["a", "a"]},
        {"agents": []},
        {"turns": 0},
        {"turns": -3},
        {"colours": 1},
        {"colours": 0},
        {"colours": ["red", "RED"]},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make("agree", **options)


@pytest.mark.parametrize("colours", [-1, 9, 100])
def test_colours_counts_the_eight_colours(colours):
    """ "how many of the eight colours": -1 silently plays with seven, 9 with eight."""
    with pytest.raises(ConfigError, match="colours"):
        make("agree", colours=colours)


def test_each_colour_of_a_list_can_be_named():
    env = Agree(wording="terse", colours=["light", "light blue"])
    assert env.named("light") == "light"
    assert env.named("light blue") == "light blue"
