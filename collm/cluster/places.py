"""Places units on devices: a pure function of their planned memory and the cluster's devices. Without ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from collm.errors import ConfigError
from collm.models.blueprint import Blueprint
from collm.planning.memory import GIB, Plan, plan
from collm.planning.work import work_of
from collm.settings.rooms import Config

ROLLOUTS = "rollouts"
"""The name of rollout workers in `cluster.devices`, and the first part of each one's name."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a machine for runs on CPUs."""

    node: str
    """Ray's name of its machine."""
    kind: str
    """"cuda" or "cpu"."""
    memory: int
    """Bytes; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a unit needs of a device."""

    unit: str
    memory: int
    """Bytes at the peak; 0 if unknown."""
    share: float | None = None
    """Fraction of the device, where the settings name one."""

    def on(self, device: Device) -> float:
        """Fraction of a device that it takes; 0 if unknown."""
        if self.share is not None:
            return self.share
        return self.memory / device.memory if device.memory else 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """A unit's device."""

    device: Device
    share: float
    """Fraction of the device that is the unit's. The units of a device share all of it in proportion to their needs, so that
    those of several devices fit however Ray packs them; settings may name less."""

    def adapt(self, config: Config) -> Config:
        """The settings of a process there."""
        vllm = config.rollout.vllm
        vllm = vllm.model_copy(update={"gpu_memory_utilization": vllm.gpu_memory_utilization * self.share})
        rollout = config.rollout.model_copy(update={"vllm": vllm})
        run = config.run.model_copy(update={"device": self.device.kind})
        return config.model_copy(update={"run": run, "rollout": rollout})


def needs_of(config: Config, blueprint: Blueprint, plans: Mapping[str, Plan] | None = None) -> list[Need]:
    """The needs of a blueprint's units, in order. Memory is unknown for a model whose shape planning does not know.

    plans: those of the units by name, if they are known already. Raises ConfigError where `cluster.devices` names no unit.
    """
    named = {name: share for name, share in config.cluster.devices.items() if name != ROLLOUTS or not config.cluster.rollouts}
    needs, plans = [], _plans(config, blueprint) if plans is None else plans
    for unit in blueprint.units:
        names = [agent for policy in unit.policies for agent in policy.agents] or ["critic"]
        shares = [config.cluster.devices[name] for name in names if name in config.cluster.devices]
        named = {name: share for name, share in named.items() if name not in names}
        memory = round(plans[unit.name].peak) if unit.name in plans else 0
        needs.append(Need(unit.name, memory, max(shares, default=None)))
    if named:
        known = sorted({need.unit.rpartition("/")[2] for need in needs})
        raise ConfigError(
            f"cluster.devices names {', '.join(sorted(named))}, which has no model of its own here. Name the trained agents, "
            f"or 'critic' for critics that are separate models: {', '.join(known)}."
        )
    return needs


def needs_of_workers(config: Config, blueprint: Blueprint) -> list[Need]:
    """The needs of `cluster.rollouts` workers, each of which holds all policies and generates the answers of a shard."""
    memory, rollout = 0, config.rollout
    one = rollout.model_copy(update={"tasks": math.ceil(rollout.tasks / rollout.shards)})
    with suppress(ConfigError):
        shard = config.model_copy(update={"rollout": one})
        found = plan(shard, work_of(shard), replace(blueprint, critics=(), references=()))
        held = sum(size for part, size in found.held.items() if part != "optimizer")
        memory = round(held + max(phase.total for phase in found.phases if phase.name.startswith("generation")))
    share = config.cluster.devices.get(ROLLOUTS)
    return [Need(f"{ROLLOUTS}/{number}", memory, share) for number in range(config.cluster.rollouts)]


def _plans(config: Config, blueprint: Blueprint) -> dict[str, Plan]:
    """Unit -> its plan, of those whose models planning knows."""
    plans = {}
    with suppress(ConfigError):
        work = work_of(config)
        for unit in blueprint.units:
            with suppress(ConfigError):
                plans[unit.name] = plan(config, work, blueprint.alone(unit))
    return plans


def place(needs: Sequence[Need], devices: Sequence[Device]) -> dict[str, Place]:
    """Unit -> its place. Units are spread, the largest first, over the emptiest devices; if they do not fit so, each is put on
    the first device that has room. Raises ConfigError with the smallest change with which they would fit."""
    found = _spread(needs, devices) or _packed(needs, devices)
    if found is None:
        raise ConfigError(_way_out(needs, devices))
    taken = {number: [need for need in needs if found[need.unit] == number] for number in set(found.values())}
    places = {}
    for need in needs:
        device, others = devices[found[need.unit]], taken[found[need.unit]]
        unnamed = [other.on(device) for other in others if other.share is None]
        rest = max(0.0, 1 - sum(other.share for other in others if other.share is not None))
        share = need.share
        if share is None:
            part = need.on(device) / sum(unnamed) if all(unnamed) else 1 / len(unnamed)
            share = int(rest * part * 10_000) / 10_000
        places[need.unit] = Place(device, share)
    return places


def _spread(needs: Sequence[Need], devices: Sequence[Device]) -> dict[str, int] | None:
    return _fill(needs, devices, lambda used, count, number: (used, count, number))


def _packed(needs: Sequence[Need], devices: Sequence[Device]) -> dict[str, int] | None:
    return _fill(needs, devices, lambda used, count, number: (number,))


def _fill(
    needs: Sequence[Need], devices: Sequence[Device], key: Callable[[float, int, int], tuple[float, ...]]
) -> dict[str, int] | None:
    """Unit -> number of its device: of those with room, that with the least `key(used fraction, units on it, number)`; None if
    a unit has none."""
    used, counts, found = [0.0] * len(devices), [0] * len(devices), dict[str, int]()
    for need in sorted(needs, key=lambda need: -max((need.on(device) for device in devices), default=0.0)):
        room = [number for number, device in enumerate(devices) if used[number] + need.on(device) <= 1 + 1e-9]
        if not room:
            return None
        number = min(room, key=lambda number: key(used[number], counts[number], number))
        used[number] += need.on(devices[number])
        counts[number] += 1
        found[need.unit] = number
    return found


def fewest(needs: Sequence[Need], device: Device, beside: Sequence[Device] = ()) -> int:
    """The number of devices like this one, beside others, on which first-fit, the largest unit first, puts all units. Each unit
    must fit on one."""
    number = 0
    while _packed(needs, [*beside, *[device] * number]) is None:
        number += 1
    return number


def _way_out(needs: Sequence[Need], devices: Sequence[Device]) -> str:
    """Why units do not fit on devices, and the smallest change with which they do."""
    if not devices:
        return "the cluster has no device for run.device. Set run.device='auto'."
    largest = max(devices, key=lambda device: device.memory)
    what = "GPU" if largest.kind == "cuda" else "machine"
    need = max(needs, key=lambda need: need.on(largest))
    asked = ", ".join(f"{need.unit} {_size(need)}" for need in needs)
    if need.on(largest) > 1:
        return (
            f"{need.unit} needs {_size(need)}, and the largest {what} of the cluster has {largest.memory / GIB:.1f} GiB. Add "
            f"one of {need.memory / GIB:.1f} GiB, or make the model or its batches smaller: `collm plan` names settings."
        )
    more = fewest(needs, largest, devices)
    added = f"{more} {what}{'s' * (more > 1)} of {largest.memory / GIB:.1f} GiB"
    return (
        f"the team needs {asked}, which {len(devices)} {what}{'s' * (len(devices) > 1)} of the cluster cannot hold. Add "
        f"{added}, or make models or batches smaller: `collm plan` names settings."
    )


def _size(need: Need) -> str:
    return f"{need.memory / GIB:.1f} GiB" if need.share is None else f"{need.share:g} of a device (cluster.devices)"
