"""Every world keeps its contract; `check_env` finds those that do not; names and options are refused with a way out."""

from __future__ import annotations

import argparse
import threading
import typing

import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test

from collm import check_env, make
from collm.algorithms.catalogue import CLIPPED_LOSSES, group_estimator
from collm.cli import lists
from collm.envs.base import Outcome, TextEnv, TextSpace
from collm.envs.catalogue import ENVIRONMENTS, EnvSpec
from collm.errors import ConfigError, EnvError, SandboxError
from collm.settings.presets import ALGORITHMS, BASELINES, CRITIC_BASELINES
from collm.settings.rooms import AlgorithmSettings

BUILT_IN = [
    ("agree", {}),
    ("agree", {"agents": 1, "turns": 3}),
    ("agree", {"agents": 5, "colours": 8, "turns": 2}),
    ("agree", {"agents": ["ann", "bob"], "colours": ["red", "pink"], "split": "eval"}),
    ("str_build", {}),
    ("str_build", {"split": "eval", "feedback": "perfect"}),
    ("str_build", {"agents": 1, "feedback": "score", "turns": 1}),
    ("str_build", {"agents": 3, "world": "persistent", "feedback": "perfect"}),
    ("str_build", {"agents": 8, "world": "persistent", "reward": "sparse", "strings": "english", "lengths": [2, 3, 4]}),
    ("str_build", {"blind_first_turn": True, "reward": "sparse", "strings": ["ABC"]}),
    ("str_build", {"world": "persistent", "commands_per_turn": 1, "feedback": "score", "turns": 6}),
]
BUILT_IN += [("quote", {}), ("quote", {"agents": 4, "turns": 3, "reward": "sparse", "view": "own"})]
BUILT_IN += [(name, {}) for name in ENVIRONMENTS if name not in dict(BUILT_IN)]


@pytest.mark.parametrize(
    ("name", "options"), BUILT_IN, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values()))
)
def test_built_in_worlds_keep_the_contract(name, options):
    env = make(name, **options)
    passed = check_env(env)
    assert len(passed) == 8
    parallel_api_test(make(name, **options), num_cycles=30)
    for task in range(env.num_tasks):
        observations, infos = env.reset(seed=1, options={"task": task})
        assert set(observations) == set(env.possible_agents)
        assert infos == {agent: {} for agent in env.possible_agents}  # wrappers make tensors of infos, which takes no text
        assert env.task == task
    _, rewards, _, _, infos = env.step(dict.fromkeys(env.agents, "x"))
    for info in infos.values():
        assert {"raw_reward", "reward_parts", "metrics"} <= set(info)
        assert sum(info["reward_parts"].values()) == pytest.approx(info["raw_reward"])
    assert env.max_reward is None or max(rewards.values()) <= env.max_reward


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_collm_check_passes_for_every_task(capsys, name):
    """With the options it has when none are given; where it runs code, only on a machine that can isolate it."""
    arguments = argparse.Namespace(env=name, overrides={}, json=False)
    try:
        assert lists.check(arguments) == 0
    except SandboxError as error:
        pytest.skip(f"{name}: {error}")
    assert capsys.readouterr().out.count("ok  ") == 8


# --- worlds of one's own -------------------------------------------------------------------------------------------------


class Honest(TextEnv):
    """A correct world: two agents, two turns, the reward is how many of them wrote something."""

    def __init__(self):
        super().__init__(["a", "b"], 2)

    def begin(self, task, rng):
        self.token = rng.randrange(100)
        return {agent: f"go {self.token}" for agent in self.agents}

    def play(self, answers):
        count = sum(bool(text) for text in answers.values())
        return Outcome(count, {"count": count}, dict.fromkeys(answers, f"{count} wrote"), metrics={"count": count})


def test_an_honest_world_passes():
    assert len(check_env(Honest())) == 8


class Leaking(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations["b"] = f"a wrote: {answers['a']}"
        return outcome


class LeakingInCapitals(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations["b"] = f"A WROTE: {answers['a'].upper()}"
        return outcome


class LeakingAnEnd(Honest):
    """Only the last ten characters show."""

    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations["b"] = f"a ended with {answers['a'][-10:]!r}"
        return outcome


class LeakingOnceOver(Honest):
    """What was written at the first turn shows after the second, when nobody is to know it."""

    def begin(self, task, rng):
        self.heard = ""
        return super().begin(task, rng)

    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations["a"], self.heard = self.heard or "nothing", answers["b"]
        return outcome


class Random(Honest):
    def play(self, answers):
        import random

        outcome = super().play(answers)
        outcome.reward += random.SystemRandom().random()
        return outcome


class RandomText(Honest):
    def begin(self, task, rng):
        import random

        return dict.fromkeys(self.agents, f"go {random.SystemRandom().random()}")


class Remembering(Honest):
    """State from the last episode shows in the next."""

    total = 0

    def play(self, answers):
        self.total += 1
        outcome = super().play(answers)
        outcome.observations = dict.fromkeys(answers, f"turn {self.total} of my life")
        return outcome


class RememberingOnce(Honest):
    """Only the very first episode of an instance differs, so a fresh copy cannot replay a used one."""

    def begin(self, task, rng):
        self.used = getattr(self, "used", -1) + 1
        return dict.fromkeys(self.agents, "welcome" if self.used == 0 else "welcome back")


class Numbers(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations = dict.fromkeys(answers, 7)
        return outcome


class TooLong(Honest):
    def __init__(self):
        super().__init__()
        self._space = TextSpace(max_length=100)

    def play(self, answers):
        outcome = super().play(answers)
        outcome.observations = dict.fromkeys(answers, "x" * 101)
        return outcome


class Mute(Honest):
    def begin(self, task, rng):
        return dict.fromkeys(self.agents, "")


class Unequal(Honest):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, rewards | {"a": rewards["a"] + 0.5}, *rest


class Undefined(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.reward = float("nan")
        return outcome


class Infinite(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.reward = float("inf")
        return outcome


class TextReward(Honest):
    def step(self, actions):
        observations, rewards, *rest = super().step(actions)
        return observations, dict.fromkeys(rewards, "one"), *rest


class BothEnds(Honest):
    def step(self, actions):
        observations, rewards, terminations, _, infos = super().step(actions)
        return observations, rewards, terminations, dict(terminations), infos


class BothEndsBeforeTheLast(Honest):
    """Agent a leaves after the first turn, terminated and truncated at once; b plays on and ends properly."""

    def step(self, actions):
        first = self.turn == 0
        observations, rewards, terminations, truncations, infos = super().step(
            dict.fromkeys(self.possible_agents, "") | dict(actions)
        )
        acted = list(actions)
        if first:
            self.agents = ["b"]
            terminations, truncations = {"a": True, "b": False}, {"a": True, "b": False}
        return tuple({a: d[a] for a in acted} for d in (observations, rewards, terminations, truncations, infos))


class NeitherEnd(Honest):
    def step(self, actions):
        observations, rewards, terminations, truncations, infos = super().step(actions)
        return observations, rewards, dict.fromkeys(terminations, False), truncations, infos


class Endless(Honest):
    def step(self, actions):
        self.turn = 0
        return super().step(actions)


class WordMetric(Honest):
    def play(self, answers):
        outcome = super().play(answers)
        outcome.metrics = {"verdict": "good"}
        return outcome


BROKEN = {
    Leaking: "shows in what",
    LeakingInCapitals: "shows in what",
    LeakingAnEnd: "shows in what",
    LeakingOnceOver: "shows in what",
    Random: "differ",
    RandomText: "differ",
    Remembering: "differ",
    RememberingOnce: "differ",
    Numbers: "not text",
    TooLong: "space",
    Mute: "reads nothing",
    Unequal: "different rewards",
    Undefined: "finite|number",
    Infinite: "finite|number",
    TextReward: "number",
    BothEnds: "both or neither",
    BothEndsBeforeTheLast: "both or neither",
    NeitherEnd: "both or neither|parallel_api_test",
    Endless: "does not end|parallel_api_test",
    WordMetric: "not a number",
}


@pytest.mark.parametrize("broken", list(BROKEN), ids=lambda kind: kind.__name__)
def test_broken_worlds_are_rejected_with_the_reason(broken):
    with pytest.raises(EnvError, match=BROKEN[broken]):
        check_env(broken())


class Foreign(ParallelEnv):
    """A PettingZoo world that knows nothing of collm: its own text spaces, agents that leave, truncation, no metrics."""

    metadata: typing.ClassVar = {"name": "foreign"}
    limit = 4

    def __init__(self):
        self.possible_agents = ["north", "south"]
        self.agents = []
        self.render_mode = None
        self.spaces = {agent: spaces.Text(max_length=200) for agent in self.possible_agents}

    def observation_space(self, agent):
        return self.spaces[agent]

    def action_space(self, agent):
        return self.spaces[agent]

    def reset(self, seed=None, options=None):
        self.agents, self.count = list(self.possible_agents), 0
        return dict.fromkeys(self.agents, "begin"), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.count += 1
        acted = list(self.agents)
        over = self.count == self.limit
        left = {agent: agent == "north" and self.count == 2 for agent in acted}
        self.agents = [] if over else [agent for agent in acted if not left[agent]]
        return (
            dict.fromkeys(acted, f"round{self.count}"),
            dict.fromkeys(acted, 1.0),
            left,
            {agent: over and not left[agent] for agent in acted},
            {agent: {} for agent in acted},
        )


class Locked(Honest):
    """Holds what cannot be copied, as a world with a sandbox, a socket or a thread does."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def play(self, answers):
        with self.lock:
            return super().play(answers)


class Strict(Foreign):
    """Asserts what PettingZoo promises it: that every action lies in its space of ten letters and digits."""

    def __init__(self):
        super().__init__()
        self.actions = {agent: spaces.Text(max_length=10) for agent in self.possible_agents}

    def action_space(self, agent):
        return self.actions[agent]

    def step(self, actions):
        assert all(self.actions[agent].contains(text) for agent, text in actions.items()), actions
        return super().step(actions)


class Buttons(Foreign):
    """Not a world of text: its actions are numbers."""

    def __init__(self):
        super().__init__()
        self.buttons = {agent: spaces.Discrete(3) for agent in self.possible_agents}

    def action_space(self, agent):
        return self.buttons[agent]


class Screens(Foreign):
    """Not a world of text: its observations are numbers."""

    def __init__(self):
        super().__init__()
        self.spaces = {agent: spaces.Discrete(3) for agent in self.possible_agents}
        self.texts = {agent: spaces.Text(max_length=200) for agent in self.possible_agents}

    def action_space(self, agent):
        return self.texts[agent]

    def reset(self, seed=None, options=None):
        _, infos = super().reset(seed, options)
        return dict.fromkeys(self.agents, 1), infos

    def step(self, actions):
        observations, *rest = super().step(actions)
        return dict.fromkeys(observations, 2), *rest


def test_a_foreign_world_with_leaving_agents_and_truncation_passes():
    assert len(check_env(Foreign())) == 8


def test_a_world_that_cannot_be_copied_passes():
    assert check_env(Locked())


def test_a_world_is_only_given_answers_from_its_own_space():
    assert len(check_env(Strict())) == 8


@pytest.mark.parametrize("kind", [Buttons, Screens])
def test_worlds_without_text_are_rejected_with_the_reason(kind):
    with pytest.raises(EnvError, match="text"):
        check_env(kind())


# --- base class ----------------------------------------------------------------------------------------------------------


class Paying(TextEnv):
    """Pays what is written."""

    shift = -2.0
    stop_above = 1.9

    def begin(self, task, rng):
        return dict.fromkeys(self.agents, "go")

    def play(self, answers):
        return Outcome(float(answers["a"]), {}, {}, shift=0.5 if answers["a"] == "0" else None)


@pytest.mark.parametrize(
    ("paid", "reward", "over"), [("1.9", -0.1, False), ("1.9000001", -0.0999999, True), ("-5", -7, False), ("0", 0.5, False)]
)
def test_shift_and_early_stop(paid, reward, over):
    env = Paying(["a", "b"], 3)
    env.reset(seed=0)
    observations, rewards, terminations, truncations, infos = env.step({"a": paid, "b": ""})
    assert rewards == {"a": pytest.approx(reward), "b": pytest.approx(reward)}
    assert infos["b"]["raw_reward"] == float(paid)
    assert set(terminations.values()) == {over}
    assert set(truncations.values()) == {False}
    assert env.agents == ([] if over else ["a", "b"])
    assert observations == {"a": "", "b": ""}


@pytest.mark.parametrize(
    ("name", "answer", "parts"),
    [
        ("agree", "red\nblue", 1),
        ("quote", "", 1),
        ("tldr", "One.\n\nTwo.", 1),
        ("coop_code", "def aux(x):\n    return x", 1),
        ("str_build", "```\n/setblock 0 0 0 stone\n\nno\n```", 2),
        ("house_build", " \n", 0),
        ("bridge_build", 'Here: {"cmds": ["a", "b"], "path": [[1, 2]], "comm": "x", "probe": null, "other": 1}', 4),
        ("bridge_build", '{"cmds": []}', 0),
        ("resource_gathering", "no object", 0),
        ("class_eval", "class A:\n    def f(self):\n        pass\n    def g(self):\n        pass\nprint(1)", 3),
        ("class_eval", "def (", 1),
    ],
)
def test_what_a_part_of_an_answer_is(name, answer, parts):
    assert make(name).num_parts(answer) == parts


def test_the_number_of_parts_is_unknown_by_default():
    assert Paying(["a"], 1).num_parts("1") is None


@pytest.mark.parametrize("wrong", [-1, 1.5, "2"])
def test_a_number_of_parts_is_a_count_or_none(wrong):
    class Counting(Honest):
        def num_parts(self, answer):
            return wrong

    with pytest.raises(EnvError, match="num_parts returned"):
        check_env(Counting())


def test_samples_of_the_text_space_lie_in_it_and_are_hostile():
    space = TextSpace()
    space.seed(0)
    samples = [space.sample() for _ in range(300)]
    assert all(space.contains(sample) for sample in samples)
    joined = "".join(samples)
    assert any(ord(c) < 32 for c in joined)
    assert any(ord(c) > 0x1F000 for c in joined)
    assert not space.contains("x" * (space.max_length + 1))
    for other in (None, 7, b"x", ["x"]):
        assert not space.contains(other)
    space.seed(0)
    assert [space.sample() for _ in range(300)] == samples


# --- names and options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "parts"),
    [
        ("agre", {}, ["unknown task 'agre'", "'agree'", "collm tasks"]),
        ("strbuild", {}, ["unknown task", "'str_build'"]),
        ("nowhere", {}, ["unknown task 'nowhere'", "module:Class"]),
        ("no_such_module:Env", {}, ["no_such_module", "PYTHONPATH"]),
        ("collm.envs.agree:Nothing", {}, ["Nothing"]),
        ("agree", {"turn": 2}, ["env.turn", "'env.turns'"]),
        ("str_build", {"wrld": "fresh"}, ["env.wrld", "'env.world'"]),
        ("str_build", {"zzz": 1}, ["env.zzz", "commands_per_turn"]),
        ("str_build", {"agents": 9}, ["str_build", "agents=9"]),
    ],
)
def test_unknown_names_and_options_are_refused_with_the_way_out(name, options, parts):
    with pytest.raises(ConfigError) as caught:
        make(name, **options)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agree", {"turns": "two"}),
        ("agree", {"turns": None}),
        ("agree", {"agents": 2.5}),
        ("agree", {"colours": 2.5}),
        ("str_build", {"turns": "4"}),
        ("str_build", {"lengths": 3}),
        ("str_build", {"strings": 5}),
        ("str_build", {"data": 3}),
        ("str_build", {"world": ["fresh"]}),
        ("str_build", {"world": "persistent", "commands_per_turn": "many"}),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value)[1:-1],
)
def test_an_option_of_the_wrong_type_is_a_config_error_that_names_it(name, options):
    """`make`: "Raises ConfigError for an unknown name or option, or an option's bad value"."""
    with pytest.raises(ConfigError, match=list(options)[-1]):
        make(name, **options)


@pytest.mark.parametrize("name", [":Env", "..envs:Agree", "json:__doc__", "json:dumps"])
def test_a_name_that_is_no_world_is_a_config_error(name):
    with pytest.raises(ConfigError):
        make(name)


def test_a_setting_that_collides_with_an_argument_of_ours_is_a_config_error():
    """`--env.split eval` in a recipe: the spec decides the split, so the setting has no meaning of its own."""
    with pytest.raises(ConfigError, match="split"):
        EnvSpec("agree", {"split": "eval"}).make("train")


def test_a_world_of_ones_own_is_made_by_module_and_class():
    env = make("test_catalogue:Foreign")
    assert env.possible_agents == ["north", "south"]
    assert EnvSpec("test_catalogue:Foreign").make("eval").possible_agents == ["north", "south"]


def test_the_split_reaches_the_world():
    spec = EnvSpec("str_build", {"turns": 2})
    assert spec.make("train").words[0] == "I"
    assert spec.make("eval").words == ["ICML", "CLIM"]
    assert spec.make("train") is not spec.make("train")


def test_settings_name_formulas_that_exist_and_the_reverse():
    returns_G = torch.tensor([1.0, 2.0, 6.0])
    assert {name: group_estimator(name)(returns_G).tolist() for name in BASELINES if name not in CRITIC_BASELINES} == {
        "group_mean": [-2, -1, 3], "leave_one_out": [-3, -1.5, 4.5], "group_max": [-5, -4, 0], "none": [1, 2, 6]
    }  # fmt: skip
    loss = typing.get_args(AlgorithmSettings.model_fields["loss"].annotation)
    assert set(loss) == {*CLIPPED_LOSSES, "reinforce"}
    names = ["collm-cc", "collm-cc-paper", "collm-dc", "magrpo", "marloo", "maremax", "mareinforce", "ac", "grpo"]
    assert list(ALGORITHMS) == names
    assert all(preset.about for preset in ALGORITHMS.values())
