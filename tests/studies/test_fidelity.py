"""Credit fidelity: the statistics by hand, and the measurement on runs of every kind of algorithm."""

from __future__ import annotations

import io
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bandits import played, uniform
from learners import weights
from rich.console import Console

import collm
from collm.errors import ConfigError, RunError
from collm.reports.grid import grid_tables
from collm.rollout.truth import return_to_go, truths
from collm.runs.fidelity import FIDELITY, Evidence, Judged, read_evidence, write_evidence
from collm.settings.load import parse_config
from collm.studies.fidelity import agreement, ceiling, pearson, spearman
from collm.studies.grid import read_grid
from collm.training.assemble import assemble, prepare
from collm.training.fidelity import JudgedTrainer, measure, restored
from collm.training.trainer import Trainer


def evidence(rows: list[tuple[int, int, float, tuple[float, ...]]]) -> Evidence:
    """rows: (episode, turn, advantage, differences)."""
    return Evidence(3, tuple(Judged(e, t, "a", advantage, differences) for e, t, advantage, differences in rows), 1, 2)


def test_correlations_by_hand():
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    assert pearson(x, y) == pytest.approx(13 / math.sqrt(5 * 50))
    assert spearman(x, y) == pytest.approx(0.8)
    assert spearman(np.array([1.0, 1.0, 2.0]), np.array([0.0, 1.0, 1.0])) == pytest.approx(0.5)
    assert math.isnan(pearson(x, np.ones(4)))
    assert math.isnan(pearson(x[:2], y[:2]))


def test_the_ceiling_by_hand_and_in_a_simulation():
    halves = np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [4.0, 10.0]])
    r = 13 / math.sqrt(5 * 50)
    assert ceiling(halves) == pytest.approx(math.sqrt(2 * r / (1 + r)))
    rng = np.random.default_rng(0)
    truth_M = rng.normal(size=20000)
    differences_MK = truth_M[:, None] + 4 * rng.normal(size=(20000, 16))
    assert ceiling(differences_MK) == pytest.approx(pearson(truth_M, differences_MK.mean(1)), abs=0.02)
    assert ceiling(rng.normal(size=(50, 1)).repeat(2, 1) * [1, -1]) == 0.0
    assert math.isnan(ceiling(np.ones((5, 4))))


def bandit(gave: Any, wrong: bool = False) -> float:
    """Fidelity on an additive bandit of advantages `gave(own, total)`. wrong: truth without the other answers subtracted."""
    plan, episodes = played(1, 60)
    wanted = [(episode, 0, "small") for episode in episodes]
    found = truths(plan, uniform(), wanted, 16, gamma=1.0)
    rows = []
    for e, (episode, truth) in enumerate(zip(episodes, found, strict=True)):
        own, total = int(episode.turns[0].completions["small"].text), return_to_go(episode, 0, 1.0)
        rows.append((e, 0, float(gave(own, total)), (total,) * 16 if wrong else truth.differences_K))
    return agreement(evidence(rows)).overall.pearson.mean


def test_fidelity_on_a_bandit_whose_truth_is_known():
    """The difference baseline leaves the own digit; the return has the team-mate's answer, four times as loud, in it."""
    rng = random.Random(0)
    assert bandit(lambda own, total: own - 4.5) > 0.95
    assert abs(bandit(lambda own, total: total)) < 0.6
    assert abs(bandit(lambda own, total: rng.random())) < 0.3
    assert bandit(lambda own, total: own - 4.5, wrong=True) < 0.6


def test_agreement_is_reported_per_turn_with_intervals_over_episodes():
    rng = random.Random(1)
    rows = []
    for e in range(12):
        for t in range(2):
            own = rng.gauss(0, 1)
            noise = [rng.gauss(0, 0.1) for _ in range(4)]
            rows.append((e, t, own if t else rng.gauss(0, 1), tuple(own + x for x in noise)))
    found = agreement(evidence(rows))
    assert (found.iteration, found.mismatches, found.failed, list(found.turns)) == (3, 1, 2, [0, 1])
    assert found.turns[1].pearson.mean > 0.99
    assert found.turns[0].pearson.mean < found.overall.pearson.mean < found.turns[1].pearson.mean
    low, high = found.overall.pearson.low, found.overall.pearson.high
    assert low is not None and high is not None and low < found.overall.pearson.mean < high  # noqa: PT018
    assert (found.overall.answers, found.turns[0].answers, found.overall.pearson.num_tasks) == (24, 12, 12)
    few = agreement(evidence([row for row in rows if row[0] < 3])).overall
    assert few.pearson.low is None
    assert "3 episodes" in few.pearson.note
    nothing = agreement(evidence([]))
    assert (nothing.overall.answers, nothing.turns) == (0, {})
    json.dumps(nothing.plain(), allow_nan=False)


METHODS: dict[str, dict[str, Any]] = {
    "collm-cc": {"algorithm": {"name": "collm-cc"}, "critic": {"body": "auto"}},
    "collm-dc": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "auto"}},
    "heads": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy"}},
    "no-text": {"algorithm": {"name": "collm-cc"}, "critic": {"body": "none"}},
    "counterfactual": {"algorithm": {"name": "collm-cc", "baseline": "counterfactual", "resamples": 2}},
    "magrpo": {"algorithm": {"name": "magrpo"}},
    "magrpo-teammates": {"algorithm": {"name": "magrpo", "teammates": "replay"}},
    "tree": {"algorithm": {"name": "magrpo", "tree": True, "group_size": 2}},
}


def config(folder: Path, method: str):
    values = METHODS[method]
    return parse_config(
        {
            "run": {"folder": str(folder), "name": method, "iterations": 2, "threads": 1, "trackers": []},
            "env": {"name": "agree", "wording": "terse", "turns": 2},
            "rollout": {"tasks": 2, "max_tokens": 4},
            "learner": {"lr": 1e-3},
            "evaluation": {"every": 0},
            **values,
        }
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_algorithm_is_measured_and_left_as_it_was(method, tmp_path):
    settings = prepare(config(tmp_path, method))
    made = assemble(settings)
    made.learner.update(made.collector.play(made.plan, [0, 0], [1, 2], 0), 0)
    made.engine.load(made.team)
    before = {name: tensor.clone() for name, tensor in weights(made.learner).items()}
    regressions = {
        n: t.clone() for module in made.learner.regressions.modules().values() for n, t in module.state_dict().items()
    }
    found = measure(made, settings, 1, answers=6, plays=2)
    assert (len(found.judged), found.mismatches, found.failed, found.iteration) == (6, 0, 0, 1)
    assert sorted(answer.turn for answer in found.judged) == [0, 0, 0, 1, 1, 1]
    assert measure(made, settings, 1, answers=6, plays=2) == found
    for name, tensor in weights(made.learner).items():
        assert torch.equal(tensor, before[name]), name
    after = {n: t for module in made.learner.regressions.modules().values() for n, t in module.state_dict().items()}
    assert all(torch.equal(after[name], tensor) for name, tensor in regressions.items())
    write_evidence(tmp_path, found)
    assert read_evidence(tmp_path) == found


def test_credit_is_the_updates_own(tmp_path):
    """Also after regressions have learned: what `credit` says before an update is what the update says."""
    made = assemble(prepare(config(tmp_path, "collm-cc")))
    for iteration in range(2):
        groups = made.collector.play(made.plan, [0, 0], [iteration, 9], iteration)
        credit = made.learner.credit(groups)
        assert made.learner.credit(groups) == credit
        assert made.learner.update(groups, iteration).annotations == credit
        assert made.learner.credit(groups) != credit


def test_from_python(tmp_path):
    """The state of a run is restored: regressions as well, which the episodes of the start do not have."""
    folder = Trainer(config(tmp_path, "collm-cc"), quiet=True).run()
    _, made, iteration = restored(folder, "2", {})
    assert iteration == 2
    assert any(
        module.state_dict() and float(next(iter(module.state_dict().values())).abs().sum()) > 0
        for module in made.learner.regressions.modules().values()
    )
    found = collm.fidelity(folder, answers=4, plays=2)
    assert (found.iteration, found.overall.answers) == (2, 4)
    assert collm.fidelity(collm.open_run(folder), "start", answers=4, plays=2).iteration == 0
    with pytest.raises(ConfigError, match="checkpoint='final' holds no critic"):
        collm.fidelity(folder, "final")
    with pytest.raises(ConfigError, match="answers=0, plays=16"):
        collm.fidelity(folder, answers=0)
    (folder / FIDELITY).write_text('{"iteration": 1}')
    with pytest.raises(RunError, match=r"fidelity.json.* cannot be read: it lacks 'judged'"):
        read_evidence(folder)


def test_a_run_that_is_judged_trains_as_one_that_is_not(tmp_path):
    plain = Trainer(config(tmp_path / "plain", "collm-cc"), quiet=True).run()
    trainer = JudgedTrainer(config(tmp_path / "judged", "collm-cc"), quiet=True)
    trainer.judged = 4
    judged = trainer.run()
    found = read_evidence(judged)
    assert found is not None
    assert (found.iteration, len(found.judged)) == (1, 4)

    def numbers(folder: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if not k.startswith("seconds/")} for r in collm.open_run(folder).metrics]

    assert numbers(judged) == numbers(plain)
    names = sorted(path.name for path in (plain / "checkpoints" / "000002").glob("*.safetensors"))
    for name in names:
        same = [(folder / "checkpoints" / "000002" / name).read_bytes() for folder in (plain, judged)]
        assert same[0] == same[1], name


RECIPE = """
[compare]
methods = ["magrpo"]
seeds = [0]
fidelity = 5
[settings.run]
iterations = 2
threads = 1
trackers = []
[settings.evaluation]
every = 2
[settings.rollout]
tasks = 8
max_tokens = 4
[tasks.two]
env = {name = "agree", wording = "terse", turns = 2}
"""


def test_compare_has_a_column_of_credit_fidelity(tmp_path):
    recipe, folder = tmp_path / "small.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    grid = collm.compare(recipe, folder=folder, quiet=True)
    line = grid.line("two", "magrpo")
    [result] = line.results
    assert result.fidelity is not None
    assert (result.fidelity["iteration"], result.fidelity["answers"]) == (1, 5)
    assert line.fidelity["pearson"].mean == pytest.approx(result.fidelity["pearson"]["mean"], nan_ok=True)
    text = io.StringIO()
    Console(file=text, width=200).print(*grid_tables(grid))
    assert "fidelity" in text.getvalue()
    assert read_grid(grid.study, folder / "results.json") == grid  # as it was written
    plain = json.loads((folder / "results.json").read_text())
    assert plain["tasks"]["two"]["methods"]["magrpo"]["credit_fidelity"].keys() == {"pearson", "spearman", "ceiling"}
    for run in plain["runs"]:
        run.pop("fidelity", None)
    (folder / "results.json").write_text(json.dumps(plain))
    older = read_grid(grid.study, folder / "results.json")
    assert [result.fidelity for result in older.results] == [None]
    text = io.StringIO()
    Console(file=text, width=200).print(*grid_tables(older))
    assert "fidelity" not in text.getvalue()
