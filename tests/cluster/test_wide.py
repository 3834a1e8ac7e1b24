"""A unit in several processes: whole copies that share the work, and a model that is split (FSDP2). Without Ray."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ProcessCluster, processes  # noqa: F401
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from collm.cluster.places import Device, needs_of, place
from collm.errors import ConfigError, PartLost
from collm.learning.ranks import Ranks
from collm.models.blueprint import Blueprint
from collm.models.policy import Policy
from collm.models.sources import resolve
from collm.models.split import split_body, split_policies, whole_weights
from collm.settings.load import parse_config
from collm.settings.rooms import Config
from collm.training.trainer import Trainer

TOLERANCE = 2e-5
"""Of losses and gradient norms of a first update (docs/cluster.md, G3)."""


def config_of(folder: Path, name: str, *, address: str = "local", **rooms: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "folder": str(folder), "iterations": 1, "threads": 1, "device": "cpu", "trackers": []},
        "env": {"name": "agree", "agents": 2, "turns": 2, "wording": "terse"},
        "rollout": {"tasks": 6, "max_tokens": 3, "temperature": 1.0},
        "algorithm": {"name": "collm-cc"},
        "critic": {"lr": 1e-3, "body": "auto"},
        "learner": {"lr": 1e-3, "micro_batch_tokens": 64},
        "evaluation": {"every": 0},
        "cluster": {"address": address},
    }
    for room, settings in rooms.items():
        values[room] = settings if room == "env" else {**values.get(room, {}), **settings}
    return parse_config(values)


def trained(config: Config, *, split: list[str] | None = None) -> Path:
    """Train. split: the units that must be split over processes."""
    trainer = Trainer(config, quiet=True)
    if config.cluster.address is not None:
        seats = trainer.learner.hands.seats
        assert [name for name, seat in seats.items() if getattr(seat, "split", False)] == (split or [])
    try:
        return trainer.run()
    finally:
        trainer.engine.close()


def first_update(run: Path) -> dict[str, float]:
    """Losses and gradient norms of the first iteration."""
    record = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    return {name: value for name, value in record.items() if name.endswith(("/loss", "/gradient_norm")) or "tokens/" in name}


def check_close(one: Path, other: Path) -> None:
    """G3, and folders and checkpoints of the same form, which load in one process."""
    a, b = first_update(one), first_update(other)
    assert a.keys() == b.keys()
    assert any(name.endswith("gradient_norm") and value > 0 for name, value in a.items())
    for name, value in a.items():
        assert b[name] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name
    newest = [max((run / "checkpoints").glob("[0-9]*")) for run in (one, other)]
    for folders in (newest, [run / "final" for run in (one, other)]):
        files = [sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file()) for folder in folders]
        assert files[0] == files[1]
        for path in files[0]:
            if path.suffix == ".safetensors":
                first, second = (load_file(folder / path) for folder in folders)
                assert {name: t.shape for name, t in first.items()} == {name: t.shape for name, t in second.items()}, path


def greedy(folder: Path) -> str:
    """What an exported agent answers, as transformers loads it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("color: red or blue?", return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return str(tokenizer.decode(model.generate(ids, do_sample=False, max_new_tokens=12)[0]))


def tied_model(folder: Path) -> str:
    """The tiny model with its vocabulary head tied to its embeddings."""
    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    model.config.tie_word_embeddings = True
    with torch.no_grad():
        model.model.embed_tokens.weight += 0.1 * model.lm_head.weight
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny")).save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    return str(folder)


COPIES: dict[str, dict[str, Any]] = {
    "collm-cc": {},
    "shared policy, clipped ratios, several passes": {
        "algorithm": {"name": "collm-cc", "loss": "ppo_clip", "epochs": 2, "max_drop": 0.03},
        "team": {"shared": True},
        "critic": {"epochs": 2, "replay": 3},
    },
    "value heads": {"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy", "warmup": 1}, "run": {"iterations": 2}},
    "adapters": {"team": {"lora": {"rank": 4}}},
    "joint Q": {"algorithm": {"name": "collm-cc", "baseline": "counterfactual", "resamples": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COPIES)
def test_whole_copies_share_the_work(tmp_path, processes: ProcessCluster, name):  # noqa: F811
    rooms = COPIES[name]
    alone = trained(config_of(tmp_path, "one", address="none", **rooms))
    own = name in ("collm-cc", "joint Q")
    devices = {"agent_1": 2, "critic": 2} if own else {"agent_0": 2}
    wide = trained(config_of(tmp_path, "wide", **rooms, cluster={"devices": devices}))
    assert ("agent_1, rank 1" if own else "agent_0, rank 1") in processes.seats
    check_close(alone, wide)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_split_team_is_one_process(tmp_path, processes: ProcessCluster, tied):  # noqa: F811
    """Policies, references, a critic; checkpoints load in one process, and what is exported answers alike."""
    model = tied_model(tmp_path / "tied") if tied else "tiny"
    rooms = {
        "team": {"model": model},
        "algorithm": {"name": "collm-cc", "kl_coef": 0.01, "max_drop": 0.03},
        "learner": {"gradient_checkpointing": not tied},
        "env": {"name": "worlds:Echo"},  # the tied model says nothing that earns a reward elsewhere
    }
    config = config_of(tmp_path, "wide", **rooms, cluster={"devices": {"critic": 2, "agent_0": 2, "agent_1": 2}})
    needs = needs_of(config, Blueprint.of(config, ("agent_0", "agent_1")), processes.devices("cpu")[0])
    processes.memory = min(need.memory for need in needs) - 1  # no unit fits
    wide = trained(config, split=["agent_0", "agent_1", "critic"])
    one = trained(config_of(tmp_path, "one", address="none", **rooms))
    check_close(one, wide)
    assert greedy(one / "final" / "agent_0") == greedy(wide / "final" / "agent_0")
    exported = load_file(wide / "final" / "agent_0" / "model.safetensors")
    kept = load_file(max((wide / "checkpoints").glob("[0-9]*")) / "policy-agent_0.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    processes.memory = 64 << 30
    for address, iterations in (("none", 2), ("local", 3)):  # in one process, then as whole copies
        trainer = Trainer.resume(wide, overrides={"cluster.address": address, "run.iterations": iterations}, quiet=True)
        trainer.run()
        trainer.engine.close()
    assert len((wide / "metrics.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_the_error_of_one_rank_ends_the_wait_for_the_others(tmp_path, processes: ProcessCluster):  # noqa: F811
    config = config_of(tmp_path, "lost", cluster={"devices": {"critic": 2}})
    trainer = Trainer(config, quiet=True)
    processes.seats["critic, rank 1"].process.kill()
    with pytest.raises(PartLost, match="critic, rank 1"):
        trainer.run()
    trainer.engine.close()


@pytest.mark.slow
def test_the_ranks_of_a_critic_meet_on_a_real_cluster(tmp_path):
    pytest.importorskip("ray")
    wide = trained(config_of(tmp_path, "wide", cluster={"devices": {"critic": 2}}))
    check_close(trained(config_of(tmp_path, "one", address="none")), wide)


@pytest.fixture
def one_rank(monkeypatch) -> Iterator[Ranks]:
    """A group of this process alone."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    yield Ranks.join(0, 1, f"127.0.0.1:{port}", split=True, device="cpu")
    torch.distributed.destroy_process_group()


def test_tied_weights_stay_tied_where_a_model_is_split(tmp_path, one_rank: Ranks):
    policy = Policy.from_pretrained(tied_model(tmp_path))
    before = whole_weights(policy.model)
    split_policies([policy], one_rank.mesh)
    assert policy.head.weight is policy.model.get_input_embeddings().weight
    after = whole_weights(policy.model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_splitting_the_body_alone_unties_them(tmp_path, one_rank: Ranks):
    """What the test above would see without the mending."""
    policy = Policy.from_pretrained(tied_model(tmp_path))
    before = whole_weights(policy.model)
    split_body(policy.body, one_rank.mesh)
    assert policy.head.weight is not policy.model.get_input_embeddings().weight
    assert whole_weights(policy.model).keys() != before.keys()


@pytest.mark.parametrize(
    ("rooms", "memory", "said"),
    [
        ({"critic": {"body": "frozen"}}, 64 << 30, "critic.body='frozen' learns in one process"),
        ({"team": {"lora": {"rank": 4}}}, 5 << 20, "adapters on one base cannot be split over 2"),
        ({"algorithm": {"name": "collm-dc"}, "critic": {"body": "policy"}}, 22 << 20, "value heads .* cannot be split over 2"),
    ],
)
def test_units_that_cannot_be_in_several_processes_are_refused(rooms, memory, said):
    name = "critic" if "frozen" in str(rooms) else "agent_0"
    config = config_of(Path("runs"), "refused", **rooms, cluster={"devices": {name: 2}})
    with pytest.raises(ConfigError, match=said):
        needs_of(config, Blueprint.of(config, ("agent_0", "agent_1")), Device("node", "cpu", memory))


def test_a_number_of_devices_is_whole():
    with pytest.raises(ConfigError, match=r"cluster\.devices: critic=1\.5, but devices are whole"):
        config_of(Path("runs"), "refused", cluster={"devices": {"critic": 1.5}})
    with pytest.raises(ConfigError, match="a rollout worker is on one device"):
        config_of(Path("runs"), "refused", cluster={"devices": {"rollouts": 2}, "rollouts": 1})


def test_ranks_of_a_gpu_unit_are_on_different_gpus():
    config = config_of(Path("runs"), "placed", run={"device": "cuda"}, cluster={"devices": {"critic": 2}})
    gpus = [Device("node", "cuda", 80 << 30) for _ in range(3)]
    needs = needs_of(config, Blueprint.of(config, ("agent_0", "agent_1")), gpus[0])
    found = place(needs, gpus)
    ranks = [found[f"critic, rank {number}"] for number in range(2)]
    assert ranks[0].device is not ranks[1].device
    assert [one.share for one in ranks] == [1.0, 1.0]
