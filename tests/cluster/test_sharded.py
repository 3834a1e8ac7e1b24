"""Rollout workers change nothing: number, order, deaths; over pickles and without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fingerprints import CONFIGURATIONS
from seats import PickledCluster, pickled  # noqa: F401
from servers import completion, http, serve
from test_seats import check_same, config_of, trained

from collm.cluster.places import Device, needs_of, needs_of_workers
from collm.cluster.players import Player, missing
from collm.cluster.seats import Seat
from collm.engines.local import LocalEngine
from collm.envs.catalogue import EnvSpec
from collm.errors import ConfigError, EngineError, PartLost
from collm.models.blueprint import Blueprint
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Message, Request

SHARDS = {"tasks": 6, "max_tokens": 3, "shards": 3}


def sharded(name: str, folder: Path, workers: int, *, restarts: int = 3, ahead: int = 0, server: str = "", **rooms):
    """A configuration of the fingerprints in three shards; in one process without workers."""
    cluster = {"address": "local" if workers else "none", "rollouts": workers, "restarts": restarts}
    rooms |= {"rollout": {**SHARDS, "ahead": ahead}, "cluster": cluster}
    config = config_of(name, folder, address=cluster["address"], server=server, **rooms)
    return config.model_copy(update={"run": config.run.model_copy(update={"name": f"{workers}-{folder.name}"})})


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run of one process."""
    return trained(sharded("collm-cc", tmp_path_factory.mktemp("one"), 0, evaluation={"every": 1, "episodes": 1}))


def run(folder: Path, workers: int, **rooms) -> Path:
    return trained(sharded("collm-cc", folder, workers, evaluation={"every": 1, "episodes": 1}, **rooms))


def workers_of(cluster: PickledCluster) -> list[str]:
    return [name for name in cluster.made if name.startswith("rollouts/")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("pick", [0, -1])
def test_number_and_order_of_workers_change_nothing(tmp_path, pickled, whole, workers, pick):  # noqa: F811
    pickled.pick = lambda number: pick % number
    check_same(whole, run(tmp_path, workers))
    assert workers_of(pickled) == [f"rollouts/{number}" for number in range(workers)]
    assert pickled.asked["play"] == 2 * 3 + 3  # iterations in three shards; evaluations of one task, one before training
    assert not {"generate", "renew", "rest"} & {call for name in ("agent_0", "agent_1") for call in pickled.seats[name].asked}
    assert pickled.closed


@pytest.mark.parametrize(
    ("deaths", "restarts", "made"),
    [
        ({("play", 3)}, 3, 3),
        ({("play", 1), ("play", 2), ("play", 5)}, 3, 5),
        ({("play", 3)}, 0, 2),  # the other one plays on
        ({("weights", 2)}, 3, 3),
        ({("renew", 3)}, 0, 2),
        ({("play", 2), ("fill", 6)}, 3, 3),  # lost again while it loads its models: three seats and two workers were first
        ({("rest", 1)}, 3, 3),
        ({("fill", 2)}, 3, 3),  # lost while it loads its models for the first time
    ],
)
def test_deaths_change_nothing(tmp_path, pickled, whole, capsys, deaths, restarts, made):  # noqa: F811
    pickled.deaths = deaths
    check_same(whole, run(tmp_path, 2, restarts=restarts))
    assert len(workers_of(pickled)) == made
    assert all(seat.lost for seat in pickled.ended)
    assert len({id(seat) for seat in pickled.ended}) == len(pickled.ended) == len(deaths)
    said = capsys.readouterr().err
    assert ("is made again" in said) == (made > 2)


@pytest.fixture(scope="module")
def whole_ahead(tmp_path_factory) -> Path:
    """The run of one process that plays an iteration ahead."""
    return trained(sharded("ratio per token", tmp_path_factory.mktemp("one"), 0, ahead=1, iterations=3))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_iteration_ahead_is_played_while_the_seats_learn(tmp_path, pickled, whole_ahead, workers):  # noqa: F811
    """Each worker has begun one shard when an update begins, and the run is that of one process."""
    begun = []
    parts = Seat.parts

    def noting(self, *arguments):
        begun.append(sum(seat.asked.count("play") for seat in pickled.seats.values()))
        return parts(self, *arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Seat, "parts", noting)
        check_same(whole_ahead, trained(sharded("ratio per token", tmp_path, workers, ahead=1, iterations=3)))
    assert list(dict.fromkeys(begun)) == list(
        dict.fromkeys([3 + workers, 6 + workers, 9])
    )  # three shards an iteration; the last has no next one


@pytest.mark.parametrize(
    "deaths", [{("play", 4)}, {("play", 5), ("play", 7)}, {("weights", 4)}, {("renew", 2)}, {("play", 4), ("renew", 5)}]
)
def test_deaths_change_nothing_of_an_iteration_ahead(tmp_path, pickled, whole_ahead, deaths):  # noqa: F811
    """A worker that is made again while the seats learn plays with the weights that the others have."""
    pickled.deaths = deaths
    check_same(whole_ahead, trained(sharded("ratio per token", tmp_path, 2, ahead=1, iterations=3)))
    assert len(pickled.ended) == len(deaths)


def test_weights_of_an_iteration_ahead_that_are_gone_are_not_replaced_by_newer_ones(tmp_path, pickled):  # noqa: F811
    """The last worker that holds them is lost in an update, or as it sends them: the run is lost, and can be resumed."""
    pickled.deaths = {("play", 4)}
    with pytest.raises(PartLost, match="no rollout worker is left with the weights"):
        trained(sharded("ratio per token", tmp_path, 1, ahead=1, iterations=3))
    pickled.deaths = {("play", pickled.asked["play"] + 4), ("policy", 1)}
    with pytest.raises(PartLost, match="no rollout worker is left with the weights"):
        trained(sharded("ratio per token", tmp_path / "two", 2, ahead=1, iterations=3))


def test_without_a_worker_the_run_is_lost_as_with_a_seat(tmp_path, pickled):  # noqa: F811
    pickled.deaths = {("play", 1), ("play", 2)}
    with pytest.raises(PartLost, match=r"^no rollout worker is left\. the process of rollouts/\d was lost during 'play'"):
        trained(sharded("magrpo", tmp_path, 2, restarts=0))
    assert pickled.closed


def test_a_worker_that_cannot_load_its_models_again_is_left_out(tmp_path, pickled, whole, capsys, monkeypatch):  # noqa: F811
    """An error of any type; without a second worker, the run is lost."""
    fill = Player.fill

    def filling(self, make):
        if pickled.made.count("rollouts/0") + pickled.made.count("rollouts/1") > 2:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB.")
        return fill(self, make)

    monkeypatch.setattr(Player, "fill", filling)
    pickled.deaths = {("play", 2)}
    check_same(whole, run(tmp_path, 2))
    said = capsys.readouterr().err
    assert "was not made again: CUDA out of memory.\n" in said
    assert len(pickled.ended) == 2


def test_a_lost_seat_is_not_a_lost_worker(tmp_path, pickled):  # noqa: F811
    pickled.deaths = {("tensors", 1)}
    with pytest.raises(PartLost, match=r"^the process of agent_0 was lost during 'tensors'"):
        trained(sharded("magrpo", tmp_path, 2))
    assert len(workers_of(pickled)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_workers_are_one_process_with_the_same_shards(tmp_path, pickled, name):  # noqa: F811
    """Every configuration of the fingerprints."""
    with serve(lambda request, number, connection: http(completion("red"))) as served:
        apart = trained(sharded(name, tmp_path, 2, server=served.url))
        check_same(trained(sharded(name, tmp_path, 0, server=served.url)), apart)


def test_a_run_resumes_with_another_number_of_workers(tmp_path, pickled, whole):  # noqa: F811
    """Two workers, then one process with the same shards; and its shards cannot change."""
    folder = run(tmp_path, 2, run={"iterations": 1})
    with pytest.raises(ConfigError, match=r"rollout\.shards"):
        Trainer.resume(folder, overrides={"rollout.shards": 1})
    Trainer.resume(folder, overrides={"run.iterations": 2, "cluster.address": "none"}, quiet=True).run()
    check_same(whole, folder)


def test_errors_of_workers_arrive_as_they_were_raised(tmp_path, pickled, monkeypatch):  # noqa: F811
    trainer = Trainer(sharded("magrpo", tmp_path, 2), quiet=True)
    requests = [Request(agent, (Message("user", "Name one colour."),)) for agent in ("agent_1", "agent_0")]
    assert [answer.agent for answer in trainer.engine.generate(requests)] == ["agent_1", "agent_0"]

    def broken(self, requests):
        raise EngineError("no answer.")

    monkeypatch.setattr(LocalEngine, "generate", broken)
    with pytest.raises(EngineError, match=r"^no answer\.$"):
        trainer.run()
    assert len(workers_of(pickled)) == 2  # an error is not retried


def test_a_stopped_run_does_not_wait_for_shards(tmp_path, pickled):  # noqa: F811
    trainer = Trainer(sharded("magrpo", tmp_path, 2), quiet=True)

    def stop(number: int) -> int:
        raise KeyboardInterrupt

    pickled.pick = stop
    with pytest.raises(KeyboardInterrupt):
        trainer.collect()
    workers = [pickled.seats[name] for name in ("rollouts/0", "rollouts/1")]
    trainer.engine.rest()
    assert [worker.asked.count("rest") for worker in workers] == [0, 0]
    pickled.pick = lambda number: 0
    assert len(trainer.collect()) == SHARDS["tasks"]
    trainer.engine.rest()
    assert [worker.asked.count("rest") for worker in workers] == [1, 1]


def test_weights_travel_once_per_update_from_the_seats(tmp_path, pickled):  # noqa: F811
    trainer = Trainer(sharded("collm-cc", tmp_path, 2), quiet=True)
    groups = trainer.collect()
    trainer.collect()
    asked = {name: seat.asked.count("tensors") for name, seat in pickled.seats.items()}
    assert asked == {"agent_0": 1, "agent_1": 1, "critic": 0, "rollouts/0": 0, "rollouts/1": 0}
    trainer.learner.update(groups, 0)
    policies = [pickled.seats[name].seat.held.team.policies["agent_0"] for name in ("agent_0", "rollouts/1")]

    def same() -> bool:
        return all(torch.equal(*pair) for pair in zip(*(policy.body.parameters() for policy in policies), strict=True))

    assert not same()
    trainer.engine.load(trainer.team)
    trainer.collect()
    assert same()
    assert pickled.seats["agent_0"].asked.count("tensors") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_every_process_counts_iterations(tmp_path, pickled, monkeypatch, workers):  # noqa: F811
    """Seats when they have learned, a critic's among them; workers when they get weights. The driver counts its own."""
    counted = []
    monkeypatch.setattr("collm.runs.heap.HEAP.iterated", lambda: counted.append(sys._getframe(1).f_code.co_qualname))
    cluster = {"address": "local", "rollouts": workers}
    trained(config_of("collm-cc", tmp_path, address="local", rollout=SHARDS, cluster=cluster))
    assert counted.count("Seat.parts") == 2 * 3
    assert counted.count("Trainer._iterate") == 2
    assert counted.count("Player.renew") == workers * 2


def test_an_environment_that_a_node_lacks_is_one_sentence(tmp_path, pickled, monkeypatch):  # noqa: F811
    (tmp_path / "mine.py").write_text("from collm.envs.agree import Agree\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = sharded("magrpo", tmp_path, 2)
    mine = config.env.model_copy(update={"name": "mine:Agree"})
    check = pickled.each

    def elsewhere(call, *arguments):
        for number, found in enumerate(check(call, *arguments)):
            yield found
            if number == 0:  # the other nodes
                monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
                sys.modules.pop("mine", None)

    pickled.each = elsewhere
    with pytest.raises(
        ConfigError, match=r"^the environment cannot be made on the cluster's node node 1: task 'mine:Agree' cannot be imported"
    ):
        Trainer(config.model_copy(update={"env": mine}), quiet=True)
    assert pickled.closed
    assert not pickled.made


def test_what_keeps_an_environment_from_being_made_is_its_own_sentence():
    assert missing(EnvSpec("agree", {"turns": 2})) == ""
    assert "cannot be imported" in missing(EnvSpec("nowhere:Env"))


def test_held_out_tasks_are_looked_for_on_every_node(tmp_path, pickled, monkeypatch):  # noqa: F811
    """Only a run that is evaluated needs them."""
    made = set()
    make = EnvSpec.make
    monkeypatch.setattr(EnvSpec, "make", lambda self, split="train": made.add(split) or make(self, split))
    asked = []
    pickled.each = lambda call, *arguments: asked.append(arguments[1]) or iter(())
    for every in (0, 1):
        Trainer(sharded("magrpo", tmp_path / str(every), 2, evaluation={"every": every, "episodes": 1}), quiet=True)
    assert asked == [("train",), ("train", "eval")]
    made.clear()
    assert missing(EnvSpec("agree", {"turns": 2}), ("train", "eval")) == ""
    assert made == {"train", "eval"}


def test_a_worker_needs_all_policies_without_optimizers_and_one_shards_answers():
    def needs(**more):
        values = {"env": {"name": "agree", "wording": "terse"}, "algorithm": {"name": "collm-cc"}, "run": {"device": "cpu"}}
        values["rollout"] = {"tasks": 16, "max_tokens": 64, "shards": more.pop("shards", 1)}
        config = parse_config({**values, "cluster": {"address": "local", **more}})
        blueprint = Blueprint.of(config, ("agent_0", "agent_1"))
        return needs_of(config, blueprint, Device("node", "cpu", 0)), needs_of_workers(config, blueprint)

    assert needs()[1] == []
    units, workers = needs(rollouts=2, shards=2)
    assert [need.unit for need in workers] == ["rollouts/0", "rollouts/1"]
    assert workers[0].memory == workers[1].memory < sum(need.memory for need in units)
    (one,) = needs(rollouts=1)[1]
    assert one.memory > workers[0].memory > 0
    (named,) = needs(rollouts=1, devices={"rollouts": 0.25})[1]
    assert named.share == 0.25
    with pytest.raises(ConfigError, match=r"cluster\.devices names rollouts"):
        needs(devices={"rollouts": 0.25})


def test_more_workers_than_shards_are_refused_where_there_is_a_cluster():
    values = {"env": {"name": "agree"}, "rollout": {"tasks": 3, "shards": 2}}
    with pytest.raises(ConfigError, match=r"cluster\.rollouts=3 .*Set cluster\.rollouts=2 at most"):
        parse_config({**values, "cluster": {"address": "local", "rollouts": 3}})
    assert parse_config({**values, "cluster": {"rollouts": 3}}).cluster.rollouts == 3  # resumed in one process
