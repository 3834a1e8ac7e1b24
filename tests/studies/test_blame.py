"""`collm blame`: planted faults are found by every method, and records without credit or with a lying replay are told apart."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import collm
from collm.cli.main import main
from collm.engines.scripted import ScriptedEngine
from collm.envs.base import Outcome, TextEnv
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError, RunError
from collm.reports.page import page_data
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.runs.log import episode_record
from collm.runs.read import recorded_episode
from collm.settings.load import parse_config
from collm.studies.blame import CREDIT, NO_OP, RESAMPLING, Blame, by_credit, failed, no_op_costs, total, worst
from collm.training.trainer import Trainer
from collm.types import Annotation, Episode

TURNS = 4


class Sums(TextEnv):
    """The reward of the last turn is the sum of all numbers said; an empty answer is 0."""

    num_tasks = 3

    def __init__(self, hidden: bool = False):
        super().__init__(["a", "b"], TURNS)
        self.hidden = hidden

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.sum = 0.0
        return dict.fromkeys(self.agents, "Say a number.")

    def play(self, answers: dict[str, str]) -> Outcome:
        self.sum += sum(float(answer) for answer in answers.values() if answer)
        seen = f"{random.SystemRandom().random()}" if self.hidden else f"{self.sum}"
        return Outcome(self.sum if self.last_turn else 0.0, {}, dict.fromkeys(answers, seen))


def planted(turn: int, agent: str, **options: Any) -> tuple[Plan, Episode]:
    """An episode of ones in which one answer is -5."""
    plan = Plan(EnvSpec("test_blame:Sums", options))

    def answer(request: Any) -> str:
        return "-5" if (request.agent, len(request.messages) // 2) == (agent, turn) else "1"

    [group] = collect(plan, ScriptedEngine(answer), [0], [3])
    return plan, group.episodes[0]


@pytest.mark.parametrize(("turn", "agent"), [(0, "a"), (2, "b"), (TURNS - 1, "a")])
def test_no_op_replay_finds_a_planted_fault(turn, agent):
    plan, episode = planted(turn, agent)
    costs = no_op_costs(plan, episode)
    assert costs is not None
    assert costs == {(t, a): 5.0 if (t, a) == (turn, agent) else -1.0 for t in range(TURNS) for a in "ab"}
    fault = worst(record(episode, {}), costs)
    assert (fault.agent, fault.turn, fault.cost, fault.text) == (agent, turn, 5.0, "-5")


def test_no_op_replay_knows_nothing_where_the_replay_differs():
    plan, episode = planted(1, "a", hidden=True)
    assert no_op_costs(plan, episode) is None


def record(episode: Episode, advantages: dict[tuple[int, str], float], **changed: Any) -> dict[str, Any]:
    annotations = {place: Annotation(advantage=advantage) for place, advantage in advantages.items()}
    return {**json.loads(json.dumps(episode_record(episode, annotations))), "iteration": 1, **changed}


def test_credit_blames_the_smallest_recorded_advantage():
    _, episode = planted(1, "b")
    fault = by_credit(record(episode, {(0, "a"): 0.5, (1, "b"): -2.0, (3, "a"): -0.5}))
    assert fault is not None
    assert (fault.agent, fault.turn, fault.cost, fault.text) == ("b", 1, 2.0, "-5")
    assert fault.plain()["turn"] == 2
    assert by_credit(record(episode, {})) is None


def test_an_episode_has_failed_below_the_median_of_its_task_or_of_all():
    _, episode = planted(0, "a")
    rewards = {0: [1.0, 2.0, 3.0, 4.0], 1: [0.0, 9.0]}
    records = []
    for task, own in rewards.items():
        for reward in own:
            turns = [{**turn, "reward": reward / TURNS} for turn in record(episode, {})["turns"]]
            records.append(record(episode, {}, task=task, turns=turns))
    records.append(record(episode, {}, failure="it broke"))
    assert [(r["task"], total(r)) for r in failed(records)] == [(0, 1.0), (0, 2.0), (1, 0.0)]
    assert [total(r) for r in failed(records, below=1.0)] == [0.0]
    assert failed(records, below=-1.0) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values: dict[str, Any] = {
        "run": {"name": "small", "folder": str(tmp_path_factory.mktemp("runs")), "iterations": 2, "threads": 1},
        "env": {"name": "str_build", "wording": "terse", "strings": ["IL", "LI"], "turns": 2, "world": "persistent"},
        "rollout": {"tasks": 4, "max_tokens": 12},
        "algorithm": {"name": "collm-cc"},
        "evaluation": {"every": 0},
    }
    values["run"]["trackers"] = []
    return Trainer(parse_config(values), quiet=True).run()


def test_a_run_is_blamed_by_three_methods(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(folder), "--below", "99", "--resample", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["considered"], len(found["episodes"]), found["mismatches"]) == (8, 8, 0)
    records = list(collm.open_run(folder).episodes())
    for blamed, recorded in zip(found["episodes"], records, strict=True):
        assert blamed["blamed"].keys() == {CREDIT, NO_OP, RESAMPLING}
        assert blamed["return"] == pytest.approx(total(recorded))
        credit = blamed["blamed"][CREDIT]
        answers = [said for turn in recorded["turns"] for said in turn["agents"].values()]
        assert credit["cost"] == -min(said["advantage"] for said in answers)
        for fault in blamed["blamed"].values():
            assert recorded["turns"][fault["turn"] - 1]["agents"][fault["agent"]]["wrote"] == fault["text"]
    assert main(["blame", str(folder), "--last", "1"]) == 0
    text = capsys.readouterr().out
    assert "failed of 4 recorded episodes" in text
    assert "no-op blames of" in text


def test_credit_alone_makes_no_environment(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["blame", str(folder), "--credit-only", "--json"]) == 0
    for blamed in json.loads(capsys.readouterr().out)["episodes"]:
        assert blamed["blamed"].keys() == {CREDIT}


def test_the_page_marks_the_answer_that_cost_most(folder: Path) -> None:
    run = collm.open_run(folder)
    [shown] = page_data([run])["runs"]
    training = [part["episodes"] for part in shown["sets"] if part["name"].startswith("training")]
    marked = [episode for episodes in training for episode in episodes if "blamed" in episode]
    assert 0 < len(marked) < sum(map(len, training))
    for episode in marked:
        said = episode["turns"][episode["blamed"]["turn"] - 1]["agents"][episode["blamed"]["agent"]]
        assert said["advantage"] == -episode["blamed"]["cost"]


def test_what_cannot_be_blamed_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from collm.studies.blame import blame

    with pytest.raises(ConfigError, match="last=0, resamples=0"):
        blame(folder, last=0)
    with pytest.raises(ConfigError, match="last=10, resamples=1"):
        blame(folder, resamples=1)
    assert blame(folder, below=-99.0) == Blame([], 8, 0)
    lines = (folder / "episodes" / "000002.jsonl").read_text().splitlines()
    broken = {key: value for key, value in json.loads(lines[0]).items() if key != "seed"}
    with pytest.raises(RunError, match="lacks 'seed'"):
        recorded_episode(broken)
    assert main(["blame", str(folder.parent / "nowhere")]) == 2
    assert "is not a run directory" in capsys.readouterr().err
