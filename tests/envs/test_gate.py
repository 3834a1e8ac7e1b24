"""What an environment returns is taken by one gate: numbers of any kind become floats, all else is one sentence."""

from __future__ import annotations

import math
import random
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pettingzoo import ParallelEnv
from worlds import Echo

from collm.engines.scripted import ScriptedEngine
from collm.envs import gate
from collm.envs.base import TextEnv
from collm.envs.catalogue import EnvSpec, make
from collm.envs.check import check_env
from collm.errors import ConfigError, EnvError
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.training.evaluate import Evaluation
from collm.types import Episode


class Odd(Echo):
    """Echo whose `step` returns something else after the first turn; `odd` names what."""

    def __init__(self, odd: str):
        super().__init__(turns=3)
        self.odd = odd

    def step(self, actions: Any) -> Any:
        observations, rewards, terminations, truncations, infos = super().step(actions)
        a = "agent_0"
        match self.odd:
            case "numpy":
                rewards = {agent: np.float32(0.5) for agent in rewards}
                infos[a]["metrics"] = {"e": torch.tensor(0.25), "f": Fraction(1, 4), "g": Decimal("0.25"), "h": True}
                infos[a]["raw_reward"] = np.array(0.5)
            case "nan":
                rewards[a] = math.nan
            case "infinite metric":
                infos[a]["metrics"] = {"e": np.inf}
            case "text":
                rewards[a] = "1.0"  # type: ignore[assignment]
            case "array":
                rewards[a] = np.array([1.0])  # type: ignore[assignment]
            case "none":
                infos[a]["raw_reward"] = None
            case "four":
                return observations, rewards, terminations, infos
            case "list":
                infos = []  # type: ignore[assignment]
            case "info":
                infos[a] = "won"  # type: ignore[assignment]
            case "reward":
                del rewards[a]
            case "observation":
                del observations[a]
            case "bytes":
                observations[a] = b"red"  # type: ignore[assignment]
            case "newcomer":
                self.agents = [*self.agents, "agent_9"]
            case "endless":
                self.turn = 0
                self.agents = list(self.possible_agents)
            case "key":
                infos[a]["metrics"] = {1: 1.0}
        return observations, rewards, terminations, truncations, infos


def odd(kind: str) -> ParallelEnv:
    return Odd(kind)


def play(name: str) -> Episode:
    engine = ScriptedEngine(lambda request: "red")
    return collect(Plan(EnvSpec("test_gate:odd", {"kind": name})), engine, [0], [0])[0].episodes[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "agent_0's reward is nan, not a finite number"),
        ("infinite metric", "metrics['e'] is inf, not a finite number"),
        ("text", "agent_0's reward is '1.0', not a number"),
        ("array", "agent_0's reward is array([1.]), not a number"),
        ("none", "raw_reward is None, not a number"),
        ("four", "step returned 4 values"),
        ("list", "infos is list, not a dict"),
        ("info", "agent_0's info is str, not a dict"),
        ("reward", "rewards lack agent_0"),
        ("observation", "observations lack agent_0"),
        ("bytes", "observed bytes, not text"),
        ("newcomer", "agents holds 'agent_9'"),
        ("endless", "does not end within 1000 turns"),
        ("key", "metrics has the name 1"),
    ],
)
def test_an_odd_environment_fails_its_episode_with_one_sentence(name: str, message: str) -> None:
    failure = play(name).failure
    assert message in failure
    assert "\n" not in failure
    with pytest.raises(EnvError):
        check_env(odd(name), episodes=1)


def test_numbers_of_any_kind_become_floats() -> None:
    episode = play("numpy")
    assert not episode.failure
    assert episode.metrics == {"e": 0.25, "f": 0.25, "g": 0.25, "h": 1.0}
    assert {type(value) for value in (*episode.metrics.values(), episode.turns[0].raw_reward)} == {float}
    assert episode.turns[0].reward == 0.5


@pytest.mark.parametrize(
    "name", ["", "..", ".", "a/b", "a\n", "a\0", "a" * 61, "critic", "Critic", "evaluation", "-a", "a.", " a", "a\\b", 3]
)
def test_agent_names_that_cannot_be_files_or_keys_are_refused(name: Any) -> None:
    env = Echo()
    env.possible_agents = ["other", name]
    with pytest.raises(EnvError, match="agent"):
        gate.agents_of(env)
    env.possible_agents = ["Ann", "ann"]
    with pytest.raises(EnvError, match="case alone"):
        gate.agents_of(env)
    env.possible_agents = ["agent_0", "Zoë 2", "x.y-z"]
    assert gate.agents_of(env) == ("agent_0", "Zoë 2", "x.y-z")


CALLED: list[str] = []


def unannotated(split: str = "train"):  # type: ignore[no-untyped-def]
    CALLED.append("unannotated")
    return Echo()


class NoEnv:
    def __init__(self, **options: Any):
        CALLED.append("NoEnv")


@pytest.mark.parametrize(
    "name", ["os:system", "subprocess:run", "subprocess:Popen", "builtins:print", "test_gate:unannotated", "test_gate:NoEnv"]
)
def test_only_what_makes_an_environment_is_called(name: str, tmp_path: Path) -> None:
    sentinel = tmp_path / "called"
    for option in ("command", "args"):
        with pytest.raises(ConfigError, match="annotated `-> ParallelEnv`"):
            make(name, **{option: f"touch {sentinel}"})
    assert not sentinel.exists()
    assert not CALLED


class Empty(Echo):
    num_tasks = 0


class Changing(Echo):
    def __init__(self, words: list[str]):
        super().__init__()
        words.append("changed")


def test_no_task_is_one_sentence_and_options_stay_as_they_were() -> None:
    with pytest.raises(ConfigError, match="num_tasks=0 leaves nothing to play"):
        make("test_gate:Empty")
    words = ["red"]
    make("test_gate:Changing", words=words)
    assert words == ["red"]


def test_a_metric_called_reward_does_not_replace_the_reward() -> None:
    episode = play("numpy")
    episode.metrics = {"reward": 99.0, "failed": 99.0}
    summary = Evaluation([episode], 0.0).summary()
    assert summary["evaluation/reward"] == 0.5
    assert summary["evaluation/failed"] == 0
    assert summary["evaluation/metrics/reward"] == 99.0


def test_random_structures_never_give_another_error() -> None:
    rng = random.Random(0)
    pool: list[Any] = [None, 1, "a", b"", [], (), {}, 1j, math.nan, {"agent_0": None}, {"agent_0": {}}, np.ones(2), object()]

    class Random(TextEnv):
        def begin(self, task: int, rng: random.Random) -> dict[str, str]:
            return {}

        def play(self, answers: dict[str, str]) -> Any: ...

        def step(self, actions: Any) -> Any:
            return tuple(rng.choice(pool) for _ in range(5)) if rng.random() < 0.9 else rng.choice(pool)

    for _ in range(3000):
        try:
            gate.step(Random(["agent_0"], 1), {"agent_0": ""})
        except EnvError:
            continue


class Sometimes(Echo):
    """Echo that pays NaN on its second task and reports numbers of numpy."""

    num_tasks = 2

    def __init__(self, split: str = "train"):
        super().__init__(turns=1)

    def step(self, actions: Any) -> Any:
        observations, rewards, terminations, truncations, infos = super().step(actions)
        for info in infos.values():
            info["metrics"] = {"reward": np.float32(-7.0), "length": np.int64(3)}
        if self.task:
            rewards = dict.fromkeys(rewards, math.nan)
        return observations, rewards, terminations, truncations, infos


def test_an_odd_environment_trains_resumes_and_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaN fails its episodes, which are counted; neither the run nor its resume ends; a metric called reward is not ours."""
    from collm.cli.main import main
    from collm.runs.open import open_run

    recipe = tmp_path / "odd.toml"
    recipe.write_text(
        '[run]\niterations = 2\nthreads = 1\ntrackers = []\n[env]\nname = "test_gate:Sometimes"\n[rollout]\ntasks = 4\n'
        "max_tokens = 1\n[evaluation]\nevery = 1\n"
    )
    words = ["train", str(recipe), "--run.folder", str(tmp_path), "--run.name", "odd"]
    assert main(words) == 0
    run = open_run(tmp_path / "odd")
    assert [line["episodes_failed"] for line in run.metrics[1:]] == [2, 2]
    last = run.metrics[-1]
    assert (last["evaluation/failed"], last["evaluation/episodes"]) == (1, 1)
    assert last["evaluation/reward"] != -7.0
    resume = ["train", "--resume", str(tmp_path / "odd"), "--env.name", "test_gate:Sometimes", "--run.iterations", "3"]
    assert main(resume) == 0
    assert open_run(tmp_path / "odd").metrics[-1]["iteration"] == 3
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "odd"), "--env.name", "test_gate:Sometimes", "--json"]) == 0
    assert main(["check", "test_gate:Sometimes"]) == 2
    assert "not a finite number" in capsys.readouterr().err


def test_an_observation_under_a_key_that_is_no_text_is_left_out() -> None:
    """JSON, and with it a checkpoint, could not hold it."""
    assert gate.texts({"a": "Name a colour.", ("b", 1): "Nobody reads this."}, ["a"]) == {"a": "Name a colour."}
