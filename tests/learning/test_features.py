"""What a regression reads: the metrics of the environment, or the texts of its own view alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from collm.errors import TrainingError
from collm.learning import critics
from collm.learning.batch import Batch
from collm.learning.credit import assign_values
from collm.learning.features import MetricSource, TextSource, features, points_of
from collm.learning.readings import read
from collm.learning.residual import Regressions
from collm.settings.rooms import AlgorithmSettings
from collm.types import Completion, Episode, Group, Turn

TEAM = ("a", "b")
OWN = {agent: (agent,) for agent in TEAM}


def episode(*scores: tuple[float, float], reward: float = 0.0) -> Episode:
    """An episode of as many turns as scores less one; each agent reads its own score before every turn."""
    seen = [{"a": f"Score: {one}", "b": f"Score: {other}\nSecret: {other}"} for one, other in scores]
    turns = []
    for texts in seen[:-1]:
        answers = {agent: Completion(agent, "red", (), torch.zeros(0).numpy()) for agent in TEAM}
        turns.append(Turn(texts, answers, 0.0, 0.0))
    turns[-1].reward = turns[-1].raw_reward = reward
    return Episode(0, 0, TEAM, seen[-1], turns, terminated=True)


def batch_of(*episodes: Episode) -> Batch:
    return Batch.of([Group(0, [one]) for one in episodes], TEAM)


def readings_of(batch: Batch, agents: tuple[str, ...] | None) -> tuple[TextSource, torch.Tensor]:
    source = TextSource(read, agents)
    source.collect([point for e in batch.episodes for point in points_of(e)])
    return source, features(batch, source)


def test_an_own_critic_reads_nothing_of_another_agents_texts() -> None:
    """b's secret and score change: a's features and columns stay, b's and those of a joint critic do not."""
    before, after = batch_of(episode((1, 2), (3, 4), (5, 6))), batch_of(episode((1, 7), (3, 8), (5, 9)))
    for agents, same in ((("a",), True), (("b",), False), (None, False)):
        (one, now_ETM), (other, then_ETM) = readings_of(before, agents), readings_of(after, agents)
        assert torch.equal(now_ETM, then_ETM) == same, agents
        assert (b"number/secret" in one.columns.names) != same
        assert one.columns.names == other.columns.names


def test_rewards_so_far_are_features_of_every_source() -> None:
    batch = batch_of(episode((1, 2), (3, 4), reward=2.5))
    for source in (MetricSource(()), TextSource(read, ("a",))):
        assert features(batch, source)[0, :, :2].tolist() == [[0.0, 0.0], [2.5, 2.5]]


def test_a_turn_that_an_agent_left_out_does_not_change_what_it_read() -> None:
    one = episode((1, 2), (3, 4), (5, 6))
    one.turns[1].observations.pop("a")
    first, newest = zip(*[(p.first["a"], p.newest["a"]) for p in points_of(one)], strict=True)
    assert first == ("Score: 1",) * 3
    assert newest == ("Score: 1", "Score: 1", "Score: 5")


def shout(first: str, newest: str) -> dict[str, float]:
    """A user's function."""
    return {"loud": float(newest.count("!"))}


def broken(first: str, newest: str) -> dict[str, float]:
    return {"loud": float("nan")}


def test_a_function_of_the_user_takes_the_place_of_read() -> None:
    regressions = Regressions(OWN, (), critic=True, returns="test_features:shout")
    one = episode((1, 2), (3, 4))
    one.turns[0].observations["a"] = "Score: 1!!"
    rows = regressions.read(batch_of(one))
    assert rows[regressions.returns["a"].source][0, 0, 2] == 2.0
    assert rows[regressions.returns["b"].source][0, 0, 2] == 0.0
    with pytest.raises(TrainingError, match="'loud' is nan, not a finite number"):
        Regressions(OWN, (), critic=True, returns="test_features:broken").read(batch_of(one))


def test_every_own_critic_has_a_regression_of_its_own() -> None:
    """Before the last turn the return is b's score; a reads 0 at all times: b's critic explains it, a's does not."""
    regressions = Regressions(OWN, (), critic=True, returns="readings")
    assert set(regressions.modules()) == {
        "yardstick", "regression-a", "regression-b", "readings-a", "readings-b",
    }  # fmt: skip
    batch = batch_of(*[episode((0, 0), (0, x), (0, 0), reward=x) for x in (0, 1) for _ in range(20)])
    wanted_ENT, text = critics.targeted(batch, kind="V", own_turns=False), critics.without_text(batch)
    settings: Any = AlgorithmSettings(gamma=1.0, lam=1.0)
    for _ in range(8):
        found = assign_values(
            batch, text, wanted_ENT, regressions, {"a/critic": "a", "b/critic": "b"}, settings, critic_lam=1.0
        )
    assert found.metrics["a/critic/explained_variance_turn_1"] == pytest.approx(0.0, abs=1e-6)
    assert found.metrics["b/critic/explained_variance_turn_1"] > 0.95


def test_columns_begin_where_they_are_met_and_stay() -> None:
    """A name without a reading is 0, and a column keeps its place in later iterations and after a restart."""
    regressions, again = (Regressions({"team": TEAM}, (), critic=True, returns="readings") for _ in range(2))
    first = batch_of(episode((1, 2), (3, 4)))
    regressions.read(first)
    again.texts["team"].columns.load_state_dict(regressions.texts["team"].columns.state_dict())
    later = episode((1, 2), (3, 4))
    later.turns[0].observations["b"] += "\nApples: 9"
    expected_ETM = [r.read(batch_of(later))[r.returns["team"].source] for r in (regressions, again)]
    assert torch.equal(*expected_ETM)
    names = regressions.texts["team"].columns.names
    assert names[: names.index(b"number/apples")] == [name for name in names if name != b"number/apples"]
    assert expected_ETM[0][0, 1, 2 + names.index(b"number/apples")] == 0.0


def test_metrics_that_are_not_reported_are_0_and_the_end_is_not_read() -> None:
    one = episode((1, 2), (3, 4))
    one.turns[0].metrics, one.metrics = {}, {"m": float("nan")}
    assert features(batch_of(one), MetricSource(("m",)))[0, 0].tolist() == [0.0, 0.0, 0.0]
    cut = replace(one, terminated=False, truncated=True)
    with pytest.raises(TrainingError, match="'m' is nan before turn 1"):
        features(batch_of(cut), MetricSource(("m",)))
