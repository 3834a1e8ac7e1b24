"""What a run in several places needs and gains, for `collm plan --cluster`. Without ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from collm.cluster.places import Device, fewest, needs_of, needs_of_workers, place, plan_of_worker
from collm.errors import ConfigError
from collm.models.blueprint import Blueprint
from collm.planning.advise import advise, remedies, with_settings
from collm.planning.apart import Costs, apart, costs, costs_of_worker, iteration, of_a_rank
from collm.planning.memory import GIB, Plan
from collm.planning.work import Work, work_of
from collm.settings.rooms import Config

Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outlook:
    """A run on the fewest devices of one size that hold it."""

    plans: Mapping[str, Plan]
    """Unit -> its plan; of a unit in several processes, the name of each -> its plan."""
    devices: tuple[tuple[str, ...], ...]
    """The units on each device; empty if one of them fits on none."""
    ranks: Mapping[str, int]
    """Name as in `plans` -> number of processes that hold the unit together."""
    costs: Mapping[str, Costs]
    """Name as in `plans` -> operations in an iteration, by phase."""
    alone: float
    """Operations of an iteration on one device, without rollout workers."""
    ahead: bool = False
    """Whether rollout workers generate while the seats learn."""

    @property
    def widest(self) -> tuple[str, str, float]:
        """(unit, phase, fraction) that an iteration waits for most, with a device for every unit."""
        own = self.costs
        whole = iteration([[one] for one in own.values()], ahead=self.ahead)
        size, unit, phase = max((size, unit, phase) for unit, one in own.items() for phase, size in one.items())
        return unit, phase, size / whole

    @property
    def duration(self) -> float:
        """Operations of an iteration one after another."""
        own = self.costs
        return iteration([[own[unit] for unit in units] for units in self.devices], ahead=self.ahead)

    @property
    def speed_ups(self) -> tuple[float, float]:
        """Operations on one device over those one after another: on these devices, and on one for every unit."""
        own = self.costs
        return self.alone / self.duration, self.alone / iteration([[one] for one in own.values()], ahead=self.ahead)


def outlook(config: Config, limit: int, work: Work | None = None) -> Outlook:
    """The outlook of a recipe on devices of `limit` bytes. Raises ConfigError where a model's shape is unknown, or
    `cluster.devices` puts more on a device than it holds."""
    work = work or work_of(config)
    blueprint = Blueprint.of(config, work.agents)
    alone = dict(zip((unit.name for unit in blueprint.units), apart(config, work), strict=True))
    device = Device("", "cuda", limit)
    needs = needs_of(config, blueprint, device, alone)
    plans, ranks, spent = dict[str, Plan](), dict[str, int](), dict[str, Costs]()
    for need in needs:
        each = of_a_rank(alone[need.unit], need.ranks) if need.split else alone[need.unit]
        plans |= dict.fromkeys(need.names, each)
        ranks |= dict.fromkeys(need.names, need.ranks)
        spent |= dict.fromkeys(need.names, costs(each, need.ranks))
    for number, need in enumerate(workers := needs_of_workers(config, blueprint)):
        plans[need.unit], ranks[need.unit] = plan_of_worker(config, blueprint), 1
        shards = len(range(number, config.rollout.shards, config.cluster.rollouts))
        spent[need.unit] = costs_of_worker(plans[need.unit], shards)
    needs += workers
    ahead = bool(config.rollout.ahead and workers)
    whole = iteration([[costs(found) for found in apart(with_settings(config, {"cluster.rollouts": 0}), work)]])
    if any(need.on(device) > 1 for need in needs):
        return Outlook(plans, (), ranks, spent, whole, ahead)
    devices = [Device(str(number), "cuda", limit) for number in range(fewest(needs, device))]
    found = place(needs, devices)
    placed = tuple(tuple(unit for unit in plans if found[unit].device == one) for one in devices)
    shares = {name: need.share for need in needs if need.share is not None for name in need.names}
    for units in placed:
        if (size := sum(plans[unit].peak for unit in units)) > limit:
            named = ", ".join(f"{unit} {shares[unit]:g}" for unit in units if unit in shares)
            raise ConfigError(
                f"cluster.devices ({named}) puts {' and '.join(units)} on one device, which need {size / GIB:.1f} of its "
                f"{limit / GIB:.1f} GiB. Name larger shares, or leave them out to place units by their memory."
            )
    return Outlook(plans, placed, ranks, spent, whole, ahead)


def way_out(config: Config, limit: int) -> Settings | None:
    """The smallest change of settings with which each unit fits on a device; None if none is known."""
    found = advise(config, limit, apart)
    return None if found is None else found[0]


Change = tuple[Settings, Outlook]


def helpful(config: Config, limit: int, now: Outlook) -> tuple[Change | None, Change | None]:
    """The single setting with which a run needs the fewest devices, and that with which its iterations are shortest, each with
    its outlook; None where no setting helps (by a twentieth, for time). Of those that need as few devices, the first of
    `remedies`."""
    found = []
    for overrides in _candidates(config, now):
        try:
            other = outlook(with_settings(config, overrides), limit)
        except ConfigError:
            continue  # it does not fit the other settings
        if other.devices:
            found.append((overrides, other))
    fewer = [(setting, other) for setting, other in found if len(other.devices) < len(now.devices)]
    shorter = [(setting, other) for setting, other in found if other.duration < 0.95 * now.duration]
    return (
        min(fewer, key=lambda one: len(one[1].devices), default=None),
        min(shorter, key=lambda one: one[1].duration, default=None),
    )


def _candidates(config: Config, now: Outlook) -> Iterator[dict[str, Any]]:
    work, (name, phase, _) = next(iter(now.plans.values())).work, now.widest
    if phase != "generation":
        unit = name.partition(", rank")[0]
        yield {f"cluster.devices.{unit.rpartition('/')[2]}": 2 * now.ranks[name]}
    yield from remedies(config, max(work.sequence(agent) for agent in work.agents))
    for name, value in (("critic.epochs", config.critic.epochs), ("algorithm.epochs", config.algorithm.epochs)):
        if value > 1:
            yield {name: 1}
    if config.algorithm.has_critic:
        yield from ({"critic.body": body} for body in ("policy", "frozen") if config.critic.body not in (body, "none"))
    yield {"rollout.max_tokens": config.rollout.max_tokens // 2}
