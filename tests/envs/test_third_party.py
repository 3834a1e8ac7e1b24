"""A PettingZoo world of someone else, unchanged, is checked and trains: agents that leave, truncation, no state, no tasks."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import harbour
import pytest
from learners import one_more

from collm import check_env, seeds
from collm.cli.main import main
from collm.learning.batch import Batch
from collm.learning.critics import targeted
from collm.rollout.collect import collect
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Episode


def test_the_world_knows_nothing_of_collm():
    tree = ast.parse(Path(harbour.__file__).read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(name.startswith("collm") for name in names)
    with pytest.raises(NotImplementedError):
        harbour.Harbour().state()


def test_it_passes_the_check(capsys):
    assert main(["check", "harbour:Harbour", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["passed"]) == 8
    assert main(["check", "harbour:Harbour", "--env.rounds", "1"]) == 0
    assert len(check_env(harbour.Harbour(rounds=5))) == 8


def make_trainer(folder: Path, name: str, rounds: int = 2, body: str = "auto") -> Trainer:
    values = {
        "run": {"iterations": 16, "threads": 1, "folder": str(folder), "trackers": []},
        "env": {"name": "harbour:Harbour", "rounds": rounds},
        "rollout": {"tasks": 10 if name == "magrpo" else 32, "max_tokens": 4},
        "algorithm": {"name": name},
        "learner": {"lr": 5e-4},
        "critic": {} if name == "magrpo" else {"lr": 5e-4, "body": body},
        "evaluation": {"every": 0},
    }
    return Trainer(parse_config(values), quiet=True)


def play(trainer: Trainer, count: int = 100) -> list[Episode]:
    keys = [seeds.derive("third party", number) for number in range(count)]
    return [group.episodes[0] for group in collect(trainer.plan, trainer.engine, [0] * count, keys)]


def points(episodes: list[Episode]) -> float:
    """Mean points of an episode; two are the most."""
    return sum(turn.raw_reward for episode in episodes for turn in episode.turns) / len(episodes)


def test_its_episodes_are_recorded_as_they_are(tmp_path):
    for episode in play(make_trainer(tmp_path, "collm-cc"), 5):
        assert [list(turn.completions) for turn in episode.turns] == [["keeper", "pilot"], ["pilot"]]
        assert (episode.failure, episode.terminated, episode.truncated) == ("", False, True)
        assert (episode.state, episode.metrics, episode.label) == ("", {}, "0")
        assert set(episode.observations) == {"pilot"}
        assert episode.turns[1].observations["pilot"] in ("Ahoy! Again.", "No lamp in sight. Again.")


@pytest.mark.parametrize("name", ["collm-cc", "collm-dc", "magrpo"])
def test_it_trains(tmp_path, name):
    trainer = make_trainer(tmp_path, name)
    before = points(play(trainer))
    trainer.run()
    after = points(play(trainer))
    print(f"{name}: {before:.2f} -> {after:.2f} points of 2")
    assert before <= 0.7
    assert after >= 1.4


@pytest.mark.parametrize(
    ("name", "body", "gone"), [("collm-cc", "auto", 1), ("collm-dc", "auto", 1), ("collm-dc", "policy", 0)]
)
def test_a_critic_has_targets_where_its_agent_has_left(tmp_path, name, body, gone):
    """Those that are models at every turn played; a value head on the policy at the answers of its agent alone."""
    trainer = make_trainer(tmp_path, name, rounds=3, body=body)
    batch = Batch.of(trainer.collect()[:4], trainer.team.agents)
    keeper = batch.agents.index("keeper")
    wanted_ENT = targeted(batch, kind="V", own_turns=body == "policy")
    assert batch.live_ENT[:, keeper].tolist() == [[1, 0, 0]] * 4
    assert wanted_ENT[:, keeper].tolist() == [[1, gone, gone]] * 4
    assert wanted_ENT[:, 1 - keeper].tolist() == [[1, 1, 1]] * 4
    batch, update = one_more(trainer)
    for number, episode in zip(batch.numbers, batch.episodes, strict=True):
        assert set(update.annotations[number]) == {(t, a) for t, turn in enumerate(episode.turns) for a in turn.completions}
