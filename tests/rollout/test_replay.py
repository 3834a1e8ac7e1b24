"""Branches of recorded episodes: what is kept, what is replaced, what is sampled anew."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from collm.engines.scripted import ScriptedEngine
from collm.envs.base import Outcome, TextEnv
from collm.envs.catalogue import EnvSpec
from collm.errors import EnvError
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.rollout.replay import Branch, other_answers, play_on, replay_with
from collm.types import Completion, Episode

PLAIN = EnvSpec("test_replay:Digits")
TURNS = 3


class Digits(TextEnv):
    """Two agents each write a digit; the reward is their sum. The answer "end" ends the episode, "fail" breaks it.

    hidden: the second observation has a number that does not come from the seed.
    """

    def __init__(self, hidden: bool = False):
        super().__init__(["a", "b"], TURNS)
        self.hidden = hidden

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.secret = random.SystemRandom().random() if self.hidden else 0
        return {agent: f"start {rng.randrange(1000)}" for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        if "fail" in answers.values():
            raise EnvError("it broke")
        reward = float(sum(int(answer) for answer in answers.values() if answer.isdigit()))
        seen = {agent: f"{self.secret} after {' '.join(answers.values())}" for agent in answers}
        return Outcome(reward, {}, seen, done="end" in answers.values())


class Drawn:
    """Answers with a digit drawn from the request's seed; keeps the sizes of its calls."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.engine = ScriptedEngine(lambda request: str(random.Random(request.seed).randrange(10)))

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, requests):
        self.calls.append(len(requests))
        return self.engine.generate(requests)


def recorded(env: EnvSpec = PLAIN, num: int = 1) -> list[Episode]:
    groups = collect(Plan(env), Drawn(), [0] * num, list(range(7, 7 + num)))
    return [episode for group in groups for episode in group.episodes]


def said(episode: Episode) -> list[str]:
    return ["".join(c.text for c in turn.completions.values()) for turn in episode.turns]


def test_a_branch_keeps_what_was_before_replaces_one_answer_and_plays_on():
    [episode], engine = recorded(), Drawn()
    [plays] = play_on(Plan(PLAIN), engine, [Branch(episode, 1, {"b": Completion("b", "x")}, range(4))])
    assert len(plays) == 4
    for play in plays:
        assert said(play)[:2] == [said(episode)[0], said(episode)[1][0] + "x"]
        assert (play.own_from, play.terminated, play.failure) == (1, True, "")
        assert play.turns[1].observations == episode.turns[1].observations
        assert "x" in play.turns[2].observations["a"]
    assert len({said(play)[2] for play in plays} | {said(episode)[2]}) == 5  # random numbers of their own
    assert engine.calls == [8]  # four plays, two agents, one turn left


def test_all_branches_are_played_in_the_same_engine_calls():
    episodes, engine = recorded(num=3), Drawn()
    branches = [Branch(episodes[0], 0, {}, range(2)), Branch(episodes[1], 1, {}, (0,)), Branch(episodes[2], 0, {}, (5,))]
    found = play_on(Plan(PLAIN), engine, branches)
    assert [len(plays) for plays in found] == [2, 1, 1]
    assert engine.calls == [2 * (2 + 1 + 1), 2 * (2 + 1)]


def test_a_play_does_not_depend_on_the_others_and_its_number_is_its_randomness():
    [episode] = recorded()
    other = {"a": Completion("a", "x")}
    [many, alone] = play_on(Plan(PLAIN), Drawn(), [Branch(episode, 0, {}, range(3)), Branch(episode, 0, other, (2,))])
    [[same]] = play_on(Plan(PLAIN), Drawn(), [Branch(episode, 0, {}, (2,))])
    assert said(same) == said(many[2])
    assert said(alone[0])[1:] == said(same)[1:]  # the same random numbers, whatever the branch's answers
    assert said(same)[1:] != said(episode)[1:]


@pytest.mark.parametrize(("turn", "answer", "num"), [(1, "3", 4), (TURNS - 1, "3", 1), (1, "end", 1)])
def test_an_episode_that_ends_in_the_turn_is_played_once(turn, answer, num):
    [episode], engine = recorded(), Drawn()
    [plays] = play_on(Plan(PLAIN), engine, [Branch(episode, turn, {"a": Completion("a", answer)}, range(4))])
    assert (len(plays), bool(engine.calls)) == (num, num > 1)
    assert all(play.terminated for play in plays)


def test_hidden_randomness_is_a_mismatch_and_leaves_out_that_branch_alone():
    hidden = EnvSpec("test_replay:Digits", {"hidden": True})
    [episode] = recorded(hidden)
    found = play_on(Plan(hidden), Drawn(), [Branch(episode, 1, {}, range(3)), Branch(episode, 0, {}, range(3))])
    assert [len(plays) for plays in found] == [0, 3]  # nothing of the first turn is hidden yet
    changed = replace(episode, turns=[replace(episode.turns[0], reward=99.0), *episode.turns[1:]])
    assert play_on(Plan(hidden), Drawn(), [Branch(changed, 1, {})]) == [[]]
    assert replay_with(Plan(hidden), [Branch(episode, 2, {})]) == [None]


def test_a_branch_that_breaks_the_environment_is_a_failed_episode():
    [episode] = recorded()
    broken = {"a": Completion("a", "fail")}
    [[play]] = play_on(Plan(PLAIN), Drawn(), [Branch(episode, 1, broken, range(3))])
    assert play.failure == "step 1: it broke"


def test_the_recorded_rest_is_kept():
    [episode] = recorded()
    [whole, empty] = replay_with(Plan(PLAIN), [Branch(episode, 0, {}), Branch(episode, 1, {"a": Completion("a", "")})])
    assert said(whole) == said(episode)
    assert [t.reward for t in whole.turns] == [t.reward for t in episode.turns]
    assert said(empty) == [said(episode)[0], said(episode)[1][1], said(episode)[2]]
    assert empty.turns[1].reward == float(said(episode)[1][1])
    assert (empty.terminated, empty.truncated) == (True, False)
    short = replace(episode, turns=episode.turns[:2])
    [cut] = replay_with(Plan(PLAIN), [Branch(short, 1, {})])
    assert (cut.truncated, len(cut.turns)) == (True, 2)


def test_other_answers_depend_on_their_purpose():
    [episode] = recorded()
    wanted = [(episode, 1, "a"), (episode, 2, "b")]
    first, again, other = (
        [[c.text for c in answers] for answers in other_answers(Plan(PLAIN), Drawn(), wanted, 8, purpose)]
        for purpose in ("alternative", "alternative", "other")
    )
    assert first == again != other
    assert [len(answers) for answers in first] == [8, 8]
