"""Places units on devices: a pure function of their planned memory and the cluster's devices. Without ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from collm.errors import ConfigError
from collm.models.blueprint import Blueprint, Unit
from collm.planning.apart import of_a_rank
from collm.planning.memory import GENERATION, GIB, Plan, plan
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
    """What a unit needs of a device; one that is in several processes needs it once for each."""

    unit: str
    memory: int
    """Bytes at the peak; 0 if unknown."""
    share: float | None = None
    """Fraction of the device, where the settings name one."""
    ranks: int = 1
    """Number of processes that hold the unit together."""
    split: bool = False
    """Whether its models are split over them, since one device does not hold them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of its processes."""
        return (self.unit,) if self.ranks == 1 else tuple(f"{self.unit}, rank {number}" for number in range(self.ranks))

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
    """Fraction of the device that is the unit's. The units of a device share all of it in proportion to their needs; settings
    may name less."""
    number: int = 0
    """Of the device among those of the cluster."""
    taken: float = 1.0
    """Fraction of the device that all its units have together."""

    def adapt(self, config: Config) -> Config:
        """The settings of a process there."""
        vllm = config.rollout.vllm
        vllm = vllm.model_copy(update={"gpu_memory_utilization": vllm.gpu_memory_utilization * self.share})
        rollout = config.rollout.model_copy(update={"vllm": vllm})
        run = config.run.model_copy(update={"device": self.device.kind})
        return config.model_copy(update={"run": run, "rollout": rollout})


def needs_of(config: Config, blueprint: Blueprint, largest: Device, plans: Mapping[str, Plan] | None = None) -> list[Need]:
    """The needs of a blueprint's units, in order. Memory is unknown for a model whose shape planning does not know.

    A unit to which `cluster.devices` gives several devices is split over them if the largest does not hold it; else each of its
    processes has a whole copy. A rank has a GPU of its own.

    Args:
        largest: the device with the most memory.
        plans: those of the units by name, if they are known already.
    Raises ConfigError where `cluster.devices` names no unit, or a unit that cannot be in several processes.
    """
    named = {name: share for name, share in config.cluster.devices.items() if name != ROLLOUTS or not config.cluster.rollouts}
    needs, plans = [], _plans(config, blueprint) if plans is None else plans
    for unit in blueprint.units:
        names = [agent for policy in unit.policies for agent in policy.agents] or ["critic"]
        shares = [config.cluster.devices[name] for name in names if name in config.cluster.devices]
        named = {name: share for name, share in named.items() if name not in names}
        share, found = max(shares, default=None), plans.get(unit.name)
        ranks = max(1, int(share or 1))
        split = ranks > 1 and found is not None and 0 < largest.memory < found.peak
        if ranks > 1:
            _check_wide(unit, ranks, config, split=split)
            share = 1.0 if largest.kind == "cuda" else None
        if found is not None and split:
            found = of_a_rank(found, ranks)
        needs.append(Need(unit.name, 0 if found is None else round(found.peak), share, ranks, split))
    if named:
        known = sorted({need.unit.rpartition("/")[2] for need in needs})
        raise ConfigError(
            f"cluster.devices names {', '.join(sorted(named))}, which has no model of its own here. Name the trained agents, "
            f"or 'critic' for critics that are separate models: {', '.join(known)}."
        )
    return needs


def _check_wide(unit: Unit, ranks: int, config: Config, *, split: bool) -> None:
    """Raises ConfigError for a unit that cannot be in several processes."""
    if any(critic.body == "frozen" for critic in unit.critics):
        raise ConfigError(
            f"cluster.devices gives {unit.name} {ranks} devices, but a critic with critic.body='frozen' learns in one process. "
            "Give it one device."
        )
    if split and (unit.base is not None or any(critic.body == "policy" for critic in unit.critics)):
        what = "adapters on one base" if unit.base is not None else "value heads (critic.body='policy')"
        raise ConfigError(
            f"{unit.name} does not fit on one device, and {what} cannot be split over {ranks}. Make the model or its batches "
            "smaller: `collm plan` names settings."
        )
    if split and config.rollout.engine == "vllm" and unit.policies and not config.cluster.rollouts:
        raise ConfigError(
            f"{unit.name} is split over {ranks} devices, and vLLM needs the whole model on one. Set rollout.engine='local', or "
            "cluster.rollouts for workers with whole copies."
        )


def needs_of_workers(config: Config, blueprint: Blueprint) -> list[Need]:
    """The needs of `cluster.rollouts` workers."""
    memory, share = 0, config.cluster.devices.get(ROLLOUTS)
    with suppress(ConfigError):
        memory = round(plan_of_worker(config, blueprint).peak)
    return [Need(f"{ROLLOUTS}/{number}", memory, share) for number in range(config.cluster.rollouts)]


def plan_of_worker(config: Config, blueprint: Blueprint) -> Plan:
    """The plan of a rollout worker, which holds all policies and generates the answers of a shard."""
    rollout = config.rollout
    one = rollout.model_copy(update={"tasks": math.ceil(rollout.tasks / rollout.shards)})
    shard = config.model_copy(update={"rollout": one})
    found = plan(shard, work_of(shard), replace(blueprint, critics=(), references=()))
    held = {part: size for part, size in found.held.items() if part != "optimizer"}
    return replace(found, held=held, phases=[phase for phase in found.phases if phase.name.startswith(GENERATION)])


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
    """Process of a unit -> its place. They are spread, the largest first, over the emptiest devices; if they do not fit so,
    each is on the first device that has room. Raises ConfigError with the smallest change with which they would fit."""
    needs = [replace(need, unit=name, ranks=1) for need in needs for name in need.names]
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
        places[need.unit] = Place(device, share, found[need.unit])
    sums = {number: round(sum(places[other.unit].share for other in others), 4) for number, others in taken.items()}
    return {unit: replace(one, taken=sums[one.number]) for unit, one in places.items()}


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
    needs, number = [replace(need, unit=name, ranks=1) for need in needs for name in need.names], 0
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
