"""Agents apart are one process, bit for bit: the seats' side and the driver's side, over pickles and without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fingerprints import AGREE, CONFIGURATIONS, settings_of
from safetensors.torch import load_file, save
from seats import PickledCluster, PickledSeat, pickled  # noqa: F401
from servers import completion, http, serve

from collm.cluster.seats import Seat
from collm.engines.local import LocalEngine
from collm.errors import ConfigError, EngineError, TrainingError
from collm.learning.parts import PolicyPart
from collm.models.policy import Policy
from collm.settings.load import parse_config
from collm.settings.rooms import Config
from collm.training.trainer import Trainer
from collm.types import Message, Request


def config_of(name: str, folder: Path, *, address: str = "none", iterations: int = 2, server: str = "", **rooms: Any) -> Config:
    """A configuration of the fingerprints, smaller, in a run directory of its own."""
    values = settings_of(name, folder, server)
    values["env"] = {**AGREE, "agents": values["env"].get("agents", 2)}
    for room, settings in {"rollout": {"tasks": 6, "max_tokens": 3}, "cluster": {"address": address}, **rooms}.items():
        values[room] = {**values.get(room, {}), **settings}
    values["run"] |= {"name": f"{address}-{name.replace(' ', '-').replace(',', '')}", "iterations": iterations}
    return parse_config(values)


def trained(config: Config) -> Path:
    trainer = Trainer(config, quiet=True)
    try:
        return trainer.run()
    finally:
        trainer.engine.close()


def lines(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without seconds."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("seconds/")} for line in read]


def episodes(run: Path) -> list[Any]:
    read = [json.loads(line) for path in sorted((run / "episodes").iterdir()) for line in path.read_text().splitlines()]
    return [{name: value for name, value in episode.items() if name != "seconds"} for episode in read]


def check_same(one: Path, other: Path) -> None:
    """Equal metrics, saved episodes, last checkpoints and final folders, to the bit; and models have changed."""
    assert any(value > 0 for line in lines(one) for name, value in line.items() if name.endswith("/gradient_norm"))
    assert lines(one) == lines(other)
    assert episodes(one) == episodes(other)
    newest = [max((run / "checkpoints").glob("[0-9]*")) for run in (one, other)]
    for folders in (newest, [run / "final" for run in (one, other)]):
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
        assert files[0] == files[1]
        for path in files[0]:
            if path.suffix == ".safetensors":
                first, second = (load_file(folder / path) for folder in folders)
                assert first.keys() == second.keys()
                assert all(torch.equal(first[key], second[key]) for key in first), path
            else:
                assert (folders[0] / path).read_bytes() == (folders[1] / path).read_bytes(), path


QUICK = {
    "collm-cc": ["agent_0", "agent_1", "critic"],
    "value heads": ["agent_0", "agent_1"],
    "adapter beside a whole model": ["agent_0", "agent_1"],
}
"""Configuration -> names of its seats."""
SEATS = {
    **QUICK,
    "collm-dc": ["agent_0", "agent_1", "agent_0/critic", "agent_1/critic"],
    "magrpo": ["agent_0", "agent_1"],
    "collm-cc, no language model as critic": ["agent_0", "agent_1"],
    "collm-dc, no language model as critic": ["agent_0", "agent_1"],
    "LoRA": ["agent_0"],
    "LoRA, critics that are whole models": ["agent_0", "critic"],
    "shared policy": ["agent_0", "critic"],
    "frozen team-mate on a server": ["agent_0", "critic"],
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGURATIONS]
)
def test_agents_apart_are_one_process(tmp_path, pickled: PickledCluster, name):  # noqa: F811
    """Every configuration of the fingerprints."""
    with serve(lambda request, number, connection: http(completion("red"))) as served:
        apart = trained(config_of(name, tmp_path, address="local", server=served.url))
        whole = trained(config_of(name, tmp_path, server=served.url))
    assert list(pickled.seats) == SEATS.get(name, list(pickled.seats))
    assert pickled.closed
    check_same(whole, apart)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "critic", "seats"),
    [
        ("collm-cc", {"body": "frozen"}, ["agent_0", "agent_1", "critic"]),
        ("LoRA", {"body": "frozen"}, ["agent_0"]),
        ("adapter beside a whole model", {"body": "frozen"}, ["agent_0", "agent_1"]),
        ("collm-dc", {"replay": 3, "epochs": 2}, ["agent_0", "agent_1", "agent_0/critic", "agent_1/critic"]),
        ("collm-cc", {"loss": "hl_gauss"}, ["agent_0", "agent_1", "critic"]),
    ],
)
def test_critics_of_every_kind_are_the_same_apart(tmp_path, pickled: PickledCluster, name, critic, seats):  # noqa: F811
    apart = trained(config_of(name, tmp_path, address="local", critic=critic))
    assert list(pickled.seats) == seats
    check_same(trained(config_of(name, tmp_path, critic=critic)), apart)


def test_each_seat_loads_its_own_model_only(tmp_path, pickled: PickledCluster, monkeypatch):  # noqa: F811
    loaded = []
    load = Policy.from_pretrained.__func__
    monkeypatch.setattr(
        Policy, "from_pretrained", classmethod(lambda cls, source, **rest: loaded.append(source) or load(cls, source, **rest))
    )
    trainer = Trainer(config_of("collm-cc", tmp_path, address="local"), quiet=True)
    held = {name: seat.seat.held for name, seat in pickled.seats.items()}
    assert [part.name for name in held for part in held[name].parts] == ["agent_0", "agent_1", "critic-team"]
    assert held["agent_1"].team.agents == ("agent_1",)
    assert held["critic"].team is held["critic"].engine is None
    assert loaded == ["tiny"] * 3  # the critic takes over the body of a model that it loads
    assert trainer.team.agents == ("agent_0", "agent_1")


def test_a_run_resumes_under_another_placement(tmp_path, pickled: PickledCluster):  # noqa: F811
    """One process, then seats, then one process: the run is that of one process."""
    name = "collm-cc"
    whole = trained(config_of(name, tmp_path, iterations=3))
    run = trained(config_of(name, tmp_path, address="local", iterations=1))
    for number, address in ((2, "none"), (3, "local")):
        trainer = Trainer.resume(run, overrides={"run.iterations": number, "cluster.address": address}, quiet=True)
        trainer.run()
    check_same(whole, run)


def test_model_folders_are_found_from_other_folders(tmp_path, pickled: PickledCluster, monkeypatch):  # noqa: F811
    Policy.from_pretrained("tiny").save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    models = {"model": "mine", "models": {"agent_1": "tiny"}}
    trainer = Trainer(config_of("magrpo", tmp_path, address="local", team=models), quiet=True)
    assert (trainer.config.team.model, trainer.config.team.models) == (str(tmp_path / "mine"), {"agent_1": "tiny"})
    assert pickled.seats["agent_0"].seat.held.team.policies["agent_0"].source == str(tmp_path / "mine")


def test_errors_of_seats_arrive_as_they_were_raised(tmp_path, pickled: PickledCluster, monkeypatch):  # noqa: F811
    def fail(self, batch, iteration, credit):
        raise TrainingError("iteration 0: the loss of agent_0 is nan.")

    trainer = Trainer(config_of("magrpo", tmp_path, address="local"), quiet=True)
    monkeypatch.setattr(PolicyPart, "learn", fail)
    with pytest.raises(TrainingError, match=r"^iteration 0: the loss of agent_0 is nan\.$"):
        trainer.run()
    with pytest.raises(ValueError, match="it holds other tensors than this team"):
        trainer.learner.restore(lambda name: {"nothing": torch.zeros(2)})
    (answer,) = trainer.engine.generate([Request("agent_1", (Message("user", "Name one colour."),))])
    assert answer.agent == "agent_1"
    monkeypatch.setattr(LocalEngine, "generate", _broken)
    with pytest.raises(EngineError, match=r"^no answer\.$"):
        trainer.engine.generate([Request("agent_0", (Message("user", "Name one colour."),))])


def test_a_seat_keeps_no_file_that_it_was_to_restore():
    """Each is released when it is read; none is left after an error."""
    left = []

    class Part:
        def restore(self, read):
            left.extend((sorted(seat.received), list(read(name))) for name in ("one", "two"))
            raise ValueError("no.")

    seat = Seat()
    seat.held.parts = [Part()]
    for name in ("one", "two", "three"):
        seat.receive(name, save({name: torch.zeros(1)}))
    with pytest.raises(ValueError, match="no"):
        seat.restore()
    assert left == [(["one", "three", "two"], ["one"]), (["three", "two"], ["two"])]
    assert not seat.received


class Two(Exception):
    """It is pickled with its message alone, and cannot be made again from that."""

    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_an_error_that_cannot_travel_arrives_as_its_message():
    class Broken(Seat):
        def work(self):
            raise Two("this", "that")

    with pytest.raises(RuntimeError, match=r"^Two: this and that\nin the process of a seat:\nTraceback"):
        PickledSeat("one", Broken).ask("work")()


def _broken(self, requests):
    raise EngineError("no answer.")


def test_weights_travel_when_a_checkpoint_is_written_one_file_at_a_time(tmp_path, pickled: PickledCluster):  # noqa: F811
    trainer = Trainer(config_of("collm-cc", tmp_path, address="local"), quiet=True)
    trainer.learner.update(trainer.collect(), 0)
    asked = [call for seat in pickled.seats.values() for call in seat.asked]
    assert {"generate", "parts"} < set(asked)
    assert not {"tensors", "saved"} & set(asked)
    files = trainer.learner.tensors()
    assert {"policy-agent_0", "optimizer-agent_1", "critic-team"} < set(files)
    assert [seat.asked.count("tensors") for seat in pickled.seats.values()] == [0, 0, 0]
    assert files["critic-team"]
    assert [seat.asked.count("tensors") for seat in pickled.seats.values()] == [0, 0, 1]
    assert [seat.asked.count("parts") for seat in pickled.seats.values()] == [1, 1, 2]  # values are the critic's alone


def test_only_the_asked_seats_answer(tmp_path, pickled: PickledCluster):  # noqa: F811
    trainer = Trainer(config_of("magrpo", tmp_path, address="local"), quiet=True)
    before = {name: len(seat.asked) for name, seat in pickled.seats.items()}
    requests = [Request("agent_1", (Message("user", "Name one colour."),), seed=seed) for seed in (1, 2)]
    assert [answer.agent for answer in trainer.engine.generate(requests)] == ["agent_1", "agent_1"]
    assert {name: len(seat.asked) - before[name] for name, seat in pickled.seats.items()} == {"agent_0": 0, "agent_1": 1}


@pytest.mark.parametrize("given", ["team", "engine", "learner"])
def test_objects_of_this_process_do_not_go_with_a_cluster(tmp_path, pickled: PickledCluster, given):  # noqa: F811
    with pytest.raises(ConfigError, match=r"cluster\.address='local' trains models in processes of their own"):
        Trainer(config_of("magrpo", tmp_path, address="local"), **{given: object()})
    assert not pickled.seats


def test_devices_name_what_has_a_model(tmp_path, pickled: PickledCluster):  # noqa: F811
    for devices in ({"critic": 0.5}, {"nobody": 0.5}):
        with pytest.raises(ConfigError, match=r"cluster\.devices names .*Name the trained agents.*: agent_0, agent_1\."):
            Trainer(config_of("magrpo", tmp_path, cluster={"address": "local", "devices": devices}))
    assert pickled.closed
