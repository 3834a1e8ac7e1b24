"""`critic.body = "none"`: V is a regression alone, on environment metrics and rewards or on rewards alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learners import critic_parts
from test_learning import make_trainer

from collm.algorithms.regression import TurnRegression
from collm.learning import critics
from collm.learning.batch import Batch
from collm.learning.credit import Assignment, assign_values
from collm.learning.pack import pack_readings
from collm.learning.residual import Regressions
from collm.models.critic import Critic
from collm.models.sources import resolve
from collm.runs.log import read_metrics
from collm.settings.rooms import AlgorithmSettings
from collm.training.trainer import Trainer
from collm.types import Completion, Counterfactual, Episode, Group, Turn

TEAM = ("a", "b")


def episode(*rewards: float, metric: float = 0.0, truncated: bool = False, no_op: float | None = None) -> Episode:
    """One episode of both agents; the metric "m" is reported before every turn but the first."""
    turns = []
    for t, reward in enumerate(rewards):
        answers = {agent: Completion(agent, "red", (), torch.zeros(0).numpy()) for agent in TEAM}
        turns.append(Turn(dict.fromkeys(TEAM, "Name one."), answers, reward, reward, metrics={"m": metric} if t else {}))
        if no_op is not None:
            turns[-1].no_op = dict.fromkeys(TEAM, Counterfactual(no_op, no_op, {"m": 100.0}))
    last = {"observations": dict.fromkeys(TEAM, "Name one."), "metrics": {"m": metric}}
    return Episode(0, 0, TEAM, turns=turns, truncated=truncated, terminated=not truncated, **last)


def assign(regressions: Regressions, *episodes: Episode, **settings: Any) -> Assignment:
    batch = Batch.of([Group(0, [one]) for one in episodes], TEAM)
    wanted_ENT = critics.targeted(batch, kind="V", own_turns=False)
    algorithm = AlgorithmSettings(gamma=1.0, lam=1.0, **settings)
    text = critics.without_text(batch)
    return assign_values(batch, text, wanted_ENT, regressions, {"critic": "a"}, algorithm, critic_lam=1.0)


def regressions(*, read_metrics: bool, teammates: bool = False) -> Regressions:
    reads = "global" if read_metrics else "none"
    return Regressions({"team": TEAM}, ("m",), critic=True, returns=reads, changes=reads if teammates else None)


def values(assigned: Assignment, turn: int) -> list[float | None]:
    return [found[turn, "a"].value for found in assigned.annotations]


def test_of_one_turn_v_is_the_mean_reward_of_earlier_iterations() -> None:
    """Weights of 1 and 0.9: first 0, then 2/4, then (0.9 * 2 + 3) / (0.9 * 4 + 4)."""
    alone = regressions(read_metrics=False)
    first = assign(alone, episode(1.0), episode(0.0), episode(0.0), episode(1.0))
    assert values(first, 0) == [0.0] * 4
    second = assign(alone, episode(1.0), episode(1.0), episode(1.0), episode(0.0))
    assert values(second, 0) == pytest.approx([0.5] * 4)
    assert second.credit.advantages_ENT[:, 1, 0].tolist() == pytest.approx([0.5, 0.5, 0.5, -0.5])
    assert values(assign(alone, episode(0.0)), 0) == pytest.approx([4.8 / 7.6])


@pytest.mark.parametrize("read_metrics", [True, False])
def test_later_turns_follow_from_the_rewards_so_far_and_from_metrics_if_they_are_read(read_metrics: bool) -> None:
    """Before turn 1, K features equal to the first reward x in {0, 1}, and the return that follows is x too.

    With 4 samples the ridge penalty is 20 / 4 variances: the slope on each feature is 1 / (K + 5), on all of them K / (K + 5).
    K is 3 with the metric, and 2 (sum of rewards so far, last reward) without.
    """
    one = regressions(read_metrics=read_metrics)
    both = [episode(x, x, metric=x) for x in (0.0, 0.0, 1.0, 1.0)]
    assign(one, *both)
    found = assign(one, *both)
    slope = 3 / 8 if read_metrics else 2 / 7
    assert values(found, 0) == pytest.approx([1.0] * 4)
    assert values(found, 1) == pytest.approx([0.5 - slope / 2] * 2 + [0.5 + slope / 2] * 2, abs=1e-6)
    other = assign(one, episode(1.0, 1.0, metric=9.0))
    assert (values(other, 1)[0] == pytest.approx(values(found, 1)[2], abs=0.2)) != read_metrics


def test_a_truncated_episode_is_bootstrapped_with_v_after_it() -> None:
    alone = regressions(read_metrics=False)
    assign(alone, episode(1.0, 2.0), episode(1.0, 2.0))
    found = assign(alone, episode(1.0, truncated=True))
    assert values(found, 0) == pytest.approx([3.0])
    assert found.annotations[0][0, "a"].td_error == pytest.approx(1.0 + 2.0 - 3.0)


def test_rewards_alone_give_the_difference_baseline_too() -> None:
    """The team-mates' reward is subtracted; what the replay reports as a metric is not read, however large."""
    alone = regressions(read_metrics=False, teammates=True)
    assert isinstance(alone.teammates[0], TurnRegression)
    assert alone.teammates[0].of(0).num_features == 2
    both = [episode(x, no_op=x) for x in (0.0, 1.0)] * 20
    for _ in range(10):
        found = assign(alone, *both, teammates="replay")
    left_E = found.credit.advantages_ENT[:, 0, 0]
    assert left_E.abs().max() < 0.1
    assert values(found, 0) == pytest.approx([0.5] * 40)


def test_v_is_wanted_where_a_critic_would_read(tmp_path: Path) -> None:
    batch = Batch.of(
        [Group(0, [episode(1.0), episode(1.0, 2.0, truncated=True), episode(1.0, 0.0, 2.0), episode(0.0, truncated=True)])],
        TEAM,
    )
    critic = Critic.from_pretrained(resolve("tiny"), max_tokens=512, compute="float32", device="cpu")
    packed, _ = pack_readings(batch, critic, TEAM, state=False, kind="V")
    read = critics.read(critic, critic.value, packed, batch, TEAM, 4096, "V")
    alone = critics.without_text(batch)
    assert torch.equal(alone.read_ENT, read.read_ENT)
    assert not alone.values_ENT.any()


def lines(trainer: Trainer) -> list[dict[str, Any]]:
    found = read_metrics(trainer.folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in found]


def resumed_equally(folder: Path, start: Callable[[str, int], Trainer]) -> Trainer:
    """A run of four iterations; one that begins with two and resumes has the same metrics."""
    whole = start("whole", 4)
    whole.run()
    start("part", 2).run()
    part = Trainer.resume(folder / "part", overrides={"run.iterations": 4}, quiet=True)
    part.run()
    assert repr(lines(part)) == repr(lines(whole))
    return whole


@pytest.mark.parametrize("metrics", [True, False])
def test_a_run_has_no_critic_and_resumes_exactly(tmp_path: Path, metrics: bool) -> None:
    def start(name: str, iterations: int) -> Trainer:
        changes = {"env": {"name": "worlds:Luck"}, "rollout": {"tasks": 8}, "algorithm": {"teammates": "replay"}}
        run = {"name": name, "iterations": iterations}
        return make_trainer(tmp_path, "collm-cc", 2, 0, run=run, critic={"body": "none", "metrics": metrics}, **changes)

    whole = resumed_equally(tmp_path, start)
    assert not critic_parts(whole.learner)
    last = lines(whole)[-1]
    assert {"critic/value", "critic/explained_variance_turn_1", "ceiling_turn_1", "critic/replayed"} <= last.keys()
    assert not {"critic/loss", "critic/cut", "tokens/critic"} & last.keys()
    assert last["ceiling_turn_1"] > 0.9, "the ceiling reads the metric in both cases"
    assert whole.learner.regressions.returns["team"].source.names == (("luck",) if metrics else ())
    files = {path.stem for path in (tmp_path / "whole" / "checkpoints" / "000004").glob("*.safetensors")}
    agents = {f"{kind}-agent_{n}" for kind in ("policy", "optimizer") for n in (0, 1)}
    assert files == agents | {"regression", "without", "yardstick"}


@pytest.mark.parametrize("name", ["collm-dc", "magrpo"])
def test_readings_and_effects_resume_exactly(tmp_path: Path, name: str) -> None:
    """Columns, regressions and counts of effects are in the checkpoint."""
    has_critic = name == "collm-dc"

    def start(run: str, iterations: int) -> Trainer:
        build = {"name": "str_build", "wording": "terse", "world": "persistent", "turns": 3, "strings": ["IT", "C"]}
        critic = {"body": "none"} if has_critic else {}
        algorithm = {"teammates": "effects", "group_size": 1 if has_critic else 2}
        rooms = {"algorithm": algorithm, "critic": critic, "rollout": {"tasks": 4, "max_tokens": 12}}
        return make_trainer(tmp_path, name, 2, 0, env=build, run={"name": run, "iterations": iterations}, **rooms)

    whole = resumed_equally(tmp_path, start)
    assert lines(whole)[-1]["critic/effects"] == 1.0
    files = {path.stem for path in (tmp_path / "whole" / "checkpoints" / "000004").glob("*.safetensors")}
    views = [f"{kind}-builder_{n}" for kind in ("regression", "readings") for n in (0, 1)]
    assert {"effects", "without", *(views if has_critic else ["readings"])} <= files
    table = whole.learner.regressions.effects.observers[0]
    assert sum(len(cells) > 0 for cells in table.known().values()) > 5
