"""What a critic is shown beside its text: the world's own numbers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import advantages_of, again, one_more
from test_learning import make_trainer

from collm.algorithms.advantages import discounted_returns
from collm.algorithms.regression import TurnRegression
from collm.errors import ConfigError, TrainingError
from collm.learning import learner as learner_module
from collm.learning import residual
from collm.learning.batch import Batch
from collm.learning.features import MetricSource, features
from collm.learning.residual import Regressions, View
from collm.runs.log import read_metrics
from collm.training.trainer import Trainer


def luck(folder: Path, name: str = "collm-cc", **critic: Any) -> tuple[Trainer, dict[str, Any]]:
    """Six iterations of a world whose return is a number reported before the last turn; the last line of its metrics."""
    trainer = make_trainer(
        folder,
        name,
        2,
        0,
        env={"name": "worlds:Luck"},
        run={"iterations": 6},
        critic={"body": "auto", "lr": 1e-4, "lam": 1.0, **critic},
        algorithm={"name": name, "lam": 1.0, "gamma": 1.0},
    )
    trainer.run()
    return trainer, read_metrics(trainer.folder / "metrics.jsonl")[-1]


@pytest.fixture(scope="module")
def lucky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `luck` whose critic knows the numbers."""
    return luck(tmp_path_factory.mktemp("luck"), metrics=True)[0].folder


@pytest.fixture(scope="module")
def echoing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `echo` whose baseline is the difference."""
    return echo(tmp_path_factory.mktemp("echo"), difference=True).folder


@pytest.mark.parametrize(("name", "label"), [("collm-cc", "critic"), ("collm-dc", "agent_1/critic")])
def test_with_the_worlds_numbers_a_critic_explains_what_no_text_tells(
    tmp_path: Path, lucky: Path, name: str, label: str
) -> None:
    trainer, blind = luck(tmp_path / "blind", name, metrics=False)
    assert blind[f"{label}/explained_within_tasks_turn_1"] < 0.2
    assert not trainer.learner.regressions.returns
    trainer = again(lucky) if name == "collm-cc" else luck(tmp_path / "seeing", name, metrics=True)[0]
    seeing = read_metrics(trainer.folder / "metrics.jsonl")[-1]
    assert trainer.learner.regressions.returns["team"].source.names == ("luck",)
    assert seeing[f"{label}/explained_within_tasks_turn_1"] > 0.9
    assert abs(seeing[f"{label}/explained_within_tasks_turn_0"]) < 0.2  # nobody knows yet
    assert seeing["ceiling_turn_1"] > 0.999
    assert math.isnan(seeing["ceiling_turn_0"]) or seeing["ceiling_turn_0"] < 0.2
    # advantages at the last turn lose the part that was luck
    assert seeing["agent_1/advantage_deviation"] < blind["agent_1/advantage_deviation"]


def test_values_are_the_regression_plus_what_the_text_says(lucky: Path) -> None:
    trainer = again(lucky)
    batch = Batch.of(trainer.collect(), trainer.team.agents)
    text = next(values for values in trainer.learner.hands.all("values", batch) if values is not None)
    regressions = trainer.learner.regressions
    rows = regressions.read(batch)
    predicted_ENT = residual.predict_returns(regressions.returns, rows, batch, text.read_ENT)
    view = regressions.returns["team"]
    assert torch.allclose(predicted_ENT[..., :2], view.regression(rows[view.source])[:, None, :2].expand(-1, 2, -1), atol=1e-5)
    assert not (text.values_ENT + predicted_ENT)[..., 2].any()  # after the end nothing is expected
    said = trainer.learner.update(batch.groups, trainer.iteration).annotations
    values = [said[number][1, "agent_0"].value for number in batch.numbers]
    assert values == pytest.approx((text.values_ENT + predicted_ENT)[:, 0, 1].tolist(), abs=1e-5)


def test_the_text_learns_what_the_regression_leaves_after_its_own_step(lucky: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were both to learn the old difference, their sum would move twice as far as the returns did."""
    trainer = again(lucky)
    taught: list[torch.Tensor] = []
    assign = learner_module.assign_values

    def watched(*arguments: Any, **options: Any) -> Any:
        assigned = assign(*arguments, **options)
        taught.append(assigned.credit.targets_ENT)
        return assigned

    monkeypatch.setattr(learner_module, "assign_values", watched)
    batch, _ = one_more(trainer)
    regression = trainer.learner.regressions.returns["team"].regression
    left_ET = discounted_returns(batch.rewards_ET, gamma=1.0) - regression(features(batch, MetricSource(("luck",)))[:, :2])
    assert torch.allclose(taught[0], left_ET[:, None].expand_as(taught[0]), atol=1e-5)


def test_what_the_world_counted_before_a_turn_is_recorded_with_it(lucky: Path) -> None:
    trainer = again(lucky)
    batch = Batch.of(trainer.collect(), trainer.team.agents)
    for episode, row in zip(batch.episodes, features(batch, MetricSource(("luck",))), strict=True):
        assert [turn.metrics for turn in episode.turns] == [{}, {"luck": episode.metrics["luck"]}]
        assert row[:, 2].tolist() == pytest.approx([0.0, episode.metrics["luck"], episode.metrics["luck"]])
        assert row[:, 0].tolist() == pytest.approx([0.0, 0.0, episode.turns[1].reward])


def test_a_method_without_critic_refuses_the_switch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"critic\.metrics='global', but magrpo has no critic"):
        make_trainer(tmp_path, "magrpo", 2, 0, critic={"metrics": True})


def test_a_metric_that_is_no_number_stops_the_run_and_is_named(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, env={"name": "worlds:Luck"}, rollout={"tasks": 4})
    for wrong in (math.nan, math.inf, None, "much"):
        groups = trainer.collect()
        groups[2].episodes[0].turns[1].metrics = {"luck": wrong}
        with pytest.raises(
            TrainingError, match=rf"environment metric 'luck' is {wrong!r} before turn 1 of episode 2 \(task .*\), not a finite"
        ):
            trainer.learner.update(groups, 0)
    groups = trainer.collect()
    groups[1].episodes[0].metrics = {"luck": math.nan}  # after the last turn nothing is expected
    trainer.learner.update(groups, 0)


def test_an_episode_that_was_cut_off_is_expected_to_go_on(lucky: Path) -> None:
    """Half the episodes earn 10 at their second turn and end, half are cut off there: V of their end is no 0."""
    trainer = again(lucky)
    regression = TurnRegression(3, 4, strength=0.0)
    groups = trainer.collect()
    episodes = [episode for group in groups for episode in group.episodes]
    for number, episode in enumerate(episodes):
        episode.metrics = {"luck": 0.5}
        episode.turns[1].metrics = {"luck": 0.5}
        paid = 10.0 * (number % 2)
        episode.turns[1].reward = episode.turns[1].raw_reward = paid
        episode.turns[0].reward = episode.turns[0].raw_reward = 0.0
        episode.terminated, episode.truncated = bool(paid), not paid
    batch = Batch.of(groups, trainer.team.agents)
    read_ENT = next(values for values in trainer.learner.hands.all("values", batch) if values is not None).read_ENT
    source = MetricSource(("luck",))
    views, rows = {"team": View(batch.agents, source, regression)}, {source: features(batch, source)}
    expected_ENT = torch.full((*batch.live_ENT.shape[:2], 3), 4.0)
    residual.learn_returns(views, rows, batch, expected_ENT, read_ENT, gamma=1.0, kind="V")  # 4 follows a cut
    known_ET1 = residual.predict_returns(views, rows, batch, read_ENT)[:, 0]
    cut = batch.truncated_E
    assert torch.allclose(known_ET1[cut, :2], torch.full((int(cut.sum()), 2), 7.0), atol=1e-3)  # (10 + 4) / 2
    assert torch.allclose(known_ET1[cut, 2], torch.tensor(7.0), atol=1e-3)  # as before the turn: no later one was seen
    assert not known_ET1[~cut, 2].any()  # these ended


def echo(folder: Path, *, agents: int = 2, name: str = "collm-cc", difference: bool) -> Trainer:
    """One turn, paid by the share of agents whose answer holds an "e"; the policy stands still, the critic learns."""
    trainer = make_trainer(
        folder,
        name,
        agents,
        0,
        env={"name": "worlds:Echo", "agents": agents, "turns": 1},
        run={"iterations": 8},
        critic={"body": "auto", "lr": 1e-4, "metrics": True},
        algorithm={"name": name, "teammates": "replay" if difference else "none"},
        learner={"lr": 1e-12},
    )
    trainer.run()
    return trainer


def test_what_a_team_mate_did_in_the_turn_counts_neither_for_nor_against_an_answer(tmp_path: Path, echoing: Path) -> None:
    """The reward is own half + mate's half: with the baseline an advantage is the own half less its mean, whatever the mate
    said. Without it, the mate's half is in the advantage."""

    def parts(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, update = one_more(trainer)
        said = [["e" in e.turns[0].completions[agent].text for agent in trainer.team.agents] for e in batch.episodes]
        own, mates = torch.tensor(said).double().T / 2
        return advantages_of(batch, update, 0, "agent_0"), own, mates

    def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
        return torch.corrcoef(torch.stack([x, y]))[0, 1].item()

    advantages, own, mates = parts(again(echoing))
    assert own.std() > 0.05
    assert mates.std() > 0.05
    assert abs(correlation(advantages, mates) - correlation(own, mates)) < 0.1
    assert correlation(advantages, own) > 0.95
    without, own, mates = parts(echo(tmp_path, difference=False))
    assert correlation(without, mates) > 0.4
    assert without.std() > 1.2 * advantages.std()


def test_a_baseline_that_knew_the_own_answer_would_leave_no_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong variant: the numbers after the turn as it was played explain away the answer itself."""
    monkeypatch.setattr(
        residual,
        "counterfactual_features",
        lambda batch, source, outcomes: (features(batch, source)[:, 1:], batch.played_ET),
    )
    trainer = echo(tmp_path, difference=True)
    assert advantages_of(*one_more(trainer), 0, "agent_0").std() < 0.05


def test_agents_may_have_any_name_under_the_difference(tmp_path: Path) -> None:
    names = ["a.1", "train"]
    trainer = make_trainer(tmp_path, "collm-cc", 2, 0, env={"agents": names}, run={"iterations": 1}, rollout={"tasks": 4})
    trainer.run()
    assert trainer.config.algorithm.teammates == "replay"
    assert trainer.team.agents == ("a.1", "train")


def test_the_baseline_is_level_with_v_however_returns_rise(echoing: Path) -> None:
    """V follows rising returns by itself. Were the baseline to follow too, right answers would be punished for it."""
    trainer = again(echoing)
    regressions = Regressions({"team": trainer.team.agents}, ("e",), critic=True, returns="global", changes="global")
    for iteration in range(4):
        groups = trainer.collect()
        for group in groups:
            turn = group.episodes[0].turns[0]
            turn.reward = turn.raw_reward = -4.0 + iteration + turn.reward
        batch = Batch.of(groups, trainer.team.agents)
        rows = regressions.read(batch)
        text = next(values for values in trainer.learner.hands.all("values", batch) if values is not None)
        values_ENT = text.values_ENT + residual.predict_returns(regressions.returns, rows, batch, text.read_ENT)
        G_ENT = batch.rewards_ET[:, None].expand_as(batch.live_ENT)
        changes, known = residual.teammates_changes(batch, rows, regressions)
        baselines_ENT = residual.predict_teammates(regressions.teammates, changes, known, values_ENT[..., :-1])
        residual.learn_teammates(regressions.teammates, changes, known, values_ENT[..., :-1], G_ENT)
        residual.learn_returns(regressions.returns, rows, batch, values_ENT, text.read_ENT, gamma=0.9, kind="V")
        moved_EN = (baselines_ENT - values_ENT[..., :1])[..., 0]
        assert moved_EN.mean(0).tolist() == pytest.approx([0.0, 0.0], abs=1e-5)
        if iteration:
            assert moved_EN.std() > 0.05


def test_one_who_acts_alone_learns_with_the_difference_as_without(tmp_path: Path) -> None:
    runs = [echo(tmp_path / str(on), agents=1, name="ac", difference=on) for on in (False, True)]
    ours, theirs = (read_metrics(run.folder / "metrics.jsonl") for run in runs)
    for one, other in zip(ours, theirs, strict=True):
        assert other.pop("critic/replayed", 0.0) == other.pop("critic/replay_mismatch", 0.0) == 0.0
        assert {k: v for k, v in one.items() if "seconds" not in k} == pytest.approx(
            {k: v for k, v in other.items() if "seconds" not in k}, nan_ok=True, abs=0
        )


def test_where_silence_has_no_finite_number_the_baseline_is_v(echoing: Path) -> None:
    trainer = again(echoing)
    regressions = trainer.learner.regressions
    groups = trainer.collect()
    turn = groups[3].episodes[0].turns[0]
    turn.no_op["agent_0"] = replace(turn.no_op["agent_0"], metrics={"e": math.nan})
    batch = Batch.of(groups, trainer.team.agents)
    values_ENT = next(values for values in trainer.learner.hands.all("values", batch) if values is not None).values_ENT
    changes, known = residual.teammates_changes(batch, regressions.read(batch), regressions)
    baselines_ENT = residual.predict_teammates(regressions.teammates, changes, known, values_ENT[..., :-1])
    assert baselines_ENT[3, 0, 0] == values_ENT[3, 0, 0]
    assert baselines_ENT[2, 0, 0] != values_ENT[2, 0, 0]
    assert baselines_ENT[3, 1, 0] != values_ENT[3, 1, 0]
    assert torch.isfinite(baselines_ENT).all()
