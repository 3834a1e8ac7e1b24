"""Units on devices: a pure function of planned memory and devices."""

from __future__ import annotations

import re

import pytest
from places import ROOT

from collm.cluster.places import Device, Need, Place, fewest, needs_of, place
from collm.errors import ConfigError
from collm.models.blueprint import Blueprint
from collm.planning.memory import plan
from collm.settings.load import load_config, parse_config

GIB = 1 << 30


def gpus(*memories: float, node: str = "n") -> list[Device]:
    return [Device(node, "cuda", round(memory * GIB)) for memory in memories]


def needs(**memories: float) -> list[Need]:
    return [Need(name, round(memory * GIB)) for name, memory in memories.items()]


def numbers(found: dict[str, Place], devices: list[Device]) -> dict[str, int]:
    """Unit -> number of its device (each device object is another)."""
    return {name: next(i for i, device in enumerate(devices) if device is where.device) for name, where in found.items()}


def test_each_unit_has_a_device_of_its_own_if_there_are_enough():
    devices = gpus(80, 80, 80)
    found = place(needs(a=30, b=30, critic=60), devices)
    assert numbers(found, devices) == {"critic": 0, "a": 1, "b": 2}
    assert {where.share for where in found.values()} == {1.0}


def test_units_share_what_there_is():
    devices = gpus(80)
    found = place(needs(a=20, b=20, critic=40), devices)
    assert numbers(found, devices) == {"a": 0, "b": 0, "critic": 0}
    assert {name: where.share for name, where in found.items()} == {"a": 0.25, "b": 0.25, "critic": 0.5}  # as their needs
    unknown = place(needs(a=0, b=0, critic=40), devices)
    assert {where.share for where in unknown.values()} == {0.3333}


def test_if_spreading_leaves_no_room_the_first_with_room_is_taken():
    """Spread: 60 and 25 beside 50 and 40, and no room for the last 25. Packed: 60 and 40 beside 50, 25 and 25."""
    devices = gpus(100, 100)
    found = place(needs(a=60, b=40, c=50, d=25, e=25), devices)
    assert numbers(found, devices) == {"a": 0, "b": 0, "c": 1, "d": 1, "e": 1}


def test_a_named_share_counts_instead_of_memory():
    devices = gpus(80, 80)
    asked = [Need("a", 10 * GIB, 0.5), Need("b", 10 * GIB), Need("critic", 70 * GIB, 1.0)]
    found = place(asked, devices)
    assert numbers(found, devices) == {"critic": 0, "a": 1, "b": 1}
    assert [found[name].share for name in ("a", "b", "critic")] == [0.5, 0.5, 1.0]


def test_a_place_knows_its_device_and_what_all_units_of_it_take():
    found = place([Need("a", 0, 0.3), Need("b", 0, 0.3), *needs(critic=60)], gpus(80, 80))
    assert [(found[name].number, found[name].taken) for name in ("critic", "a", "b")] == [(0, 1.0), (1, 0.6), (1, 0.6)]


def test_unknown_memory_is_spread_by_count():
    devices = gpus(80, 80)
    found = place([Need(name, 0) for name in "abcd"], devices)
    assert sorted(numbers(found, devices).values()) == [0, 0, 1, 1]
    unknown = [Device("n", "cuda", 0), Device("n", "cuda", 0)]
    assert sorted(numbers(place(needs(a=1, b=1), unknown), unknown).values()) == [0, 1]


def test_the_fewest_devices_by_hand():
    (device,) = gpus(80)
    assert fewest(needs(a=50, b=30, c=20), device) == 2
    assert fewest(needs(a=50, b=50, critic=70), device) == 3
    assert fewest(needs(a=50, b=50, critic=70), device, gpus(80, 80)) == 1
    assert fewest(needs(a=1), device, gpus(80)) == 0


def test_it_is_a_function_of_its_arguments():
    asked, devices = needs(a=20, b=20, c=20, critic=50), gpus(80, 80, 40)
    assert len({str(place(asked, devices)) for _ in range(5)}) == 1


@pytest.mark.parametrize(
    ("asked", "devices", "said"),
    [
        (needs(a=50, b=50, critic=90), gpus(80, 80), "critic needs 90.0 GiB, and the largest GPU of the cluster has 80.0 GiB"),
        (needs(a=50, b=50, critic=70), gpus(80, 80), "Add 1 GPU of 80.0 GiB"),
        (needs(a=50, b=50, c=50, critic=70), gpus(80), "which 1 GPU of the cluster cannot hold. Add 3 GPUs of 80.0 GiB"),
        ([Need("a", 0, 0.6), Need("b", 0, 0.6)], gpus(80), "a 0.6 of a device (cluster.devices)"),
        (needs(a=1), [], "no device"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_smallest_change(asked, devices, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        place(asked, devices)


def test_the_needs_of_units_are_their_plans():
    values = {
        "env": {"name": "agree", "agents": 2, "wording": "terse"},
        "run": {"device": "cpu"},
        "critic": {"body": "auto"},
        "cluster": {"devices": {"critic": 0.5, "agent_1": 0.25}},
    }
    config = parse_config(values)
    blueprint = Blueprint.of(config, ("agent_0", "agent_1"))
    found = needs_of(config, blueprint, Device("node", "cpu", 0))
    assert [(need.unit, need.share) for need in found] == [("agent_0", None), ("agent_1", 0.25), ("critic", 0.5)]
    whole = plan(config)
    assert all(0 < need.memory < whole.peak for need in found)
    held = sum(plan(config, whole.work, blueprint.alone(unit)).held["optimizer"] for unit in blueprint.units)
    assert held == whole.held["optimizer"]  # every trained number is in exactly one seat


def test_models_that_planning_does_not_know_can_be_placed():
    rooms = {"team": {"model": "somebody/unknown"}, "critic": {"body": "auto"}}
    config = parse_config({"env": {"name": "agree", "wording": "terse"}, **rooms})
    assert [
        need.memory for need in needs_of(config, Blueprint.of(config, ("agent_0", "agent_1")), Device("node", "cpu", 0))
    ] == [0, 0, 0]


def test_a_process_has_its_device_and_its_part_of_vllm_memory():
    config = parse_config({"env": {"name": "agree", "wording": "terse"}, "rollout": {"engine": "vllm"}})
    there = Place(*gpus(80), 0.5).adapt(config)
    assert there.run.device == "cuda"
    assert there.rollout.vllm.gpu_memory_utilization == pytest.approx(0.2)


def test_the_paper_team_needs_three_gpus():
    """2 x Qwen3-1.7B and a joint critic: more than one H100 holds."""
    config = load_config(ROOT / "recipes" / "paper" / "str_build" / "collm-cc-paper.toml", {"run.device": "cuda"})
    asked = needs_of(config, Blueprint.of(config, ("builder_0", "builder_1")), *gpus(80))
    with pytest.raises(ConfigError, match="Add 2 GPUs"):
        place(asked, gpus(80))
    devices = gpus(80, 80, 80)
    assert sorted(numbers(place(asked, devices), devices).values()) == [0, 1, 2]
