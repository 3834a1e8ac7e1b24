"""An iteration of units in several places, by arithmetic: memory of each, and floating-point operations by phase.

Counted are the products of a token with the weights, twice for the backward pass. Attention over long histories, environments,
transfers and waiting are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from collm.models.blueprint import Blueprint, PolicySpec
from collm.planning.memory import SAVING, Phase, Plan, plan
from collm.planning.work import Work
from collm.settings.rooms import Config

DECODING = 300
"""A decoding step on a GPU takes at least as long as the products of so many tokens, since it reads all weights: an H100 does
295 bfloat16 operations in the time in which it reads a byte, and a weight of 2 bytes takes 2 operations per token."""

Costs = Mapping[str, float]
"""Phase -> floating-point operations of one iteration. The phases follow each other; units are in a phase at the same time."""


def apart(config: Config, work: Work) -> list[Plan]:
    """The plan of every unit in a process of its own, in the blueprint's order."""
    blueprint = Blueprint.of(config, work.agents)
    return [plan(config, work, blueprint.alone(unit)) for unit in blueprint.units]


def of_a_rank(found: Plan, ranks: int) -> Plan:
    """The plan of one of the processes over which a unit's models are split. Loading a whole model comes first; what is saved
    is put together in the machine's memory."""
    split = {"weights", "optimizer", "reference policies"}

    def piece(parts: Mapping[str, float]) -> dict[str, float]:
        return {name: size / ranks if name in split or name == "gradient" else size for name, size in parts.items()}

    phases = [Phase(phase.name, piece(phase.parts)) for phase in found.phases if phase.name != SAVING]
    whole = max(4 * passes.model.trained for passes in found.passes)
    phases.append(Phase("loading", {"a whole model": whole}))
    return replace(found, held=piece(found.held), phases=phases)


def costs(found: Plan, ranks: int = 1) -> Costs:
    """What one unit computes in an iteration, or the first of its ranks, which share all but generation. With rollout workers
    it does not generate."""
    generated = 0.0 if found.config.cluster.rollouts else _generated(found, found.blueprint.policies)
    backward = {passes.model.name: 2 if passes.model.lora is None else 1 for passes in found.passes}
    again = int(found.config.learner.gradient_checkpointing)
    counted = [(passes, 2 * passes.model.products * passes.tokens) for passes in found.passes]
    return {
        "generation": generated,
        "values": sum(passes.read * size for passes, size in counted) / ranks,
        "update": sum(
            size * (passes.referred + passes.learned * (1 + backward[passes.model.name] + again)) for passes, size in counted
        )
        / ranks,
    }


def costs_of_worker(found: Plan, shards: int) -> Costs:
    """What a rollout worker computes in an iteration in which it plays so many shards. found: its plan, for one of them."""
    played = sum(_generated(found, unit.policies) for unit in found.blueprint.units)
    return {"generation": shards * played, "values": 0.0, "update": 0.0}


def _generated(found: Plan, policies: Sequence[PolicySpec]) -> float:
    """Operations of generation by a unit's policies: every prompt is read once, and their agents decode together."""
    work, config = found.work, found.config
    agents = [agent for policy in policies for agent in policy.agents]
    if not agents:
        return 0.0
    least = 1 if config.run.device == "cpu" else DECODING
    batch = max(1, config.rollout.batch_tokens // max(work.sequence(agent) for agent in agents))
    tokens = 0
    for turn in range(work.turns):
        episodes = work.episodes // (work.group ** (work.turns - 1 - turn) if work.tree else 1)
        tokens += episodes * sum(work.prompts[agent][turn] for agent in agents)
        rows = episodes * len(agents)
        tokens += work.answer * max(rows, least * math.ceil(rows / batch))
    products = next(passes.model.products for passes in found.passes if passes.model.name == policies[0].name)
    return 2.0 * products * tokens


def iteration(devices: Sequence[Sequence[Costs]], *, ahead: bool = False) -> float:
    """Operations of an iteration one after another: in each phase those of the device with the most.

    devices: of each device, the costs of its units.
    ahead: rollout workers generate during the other phases, so that those of the longer count, or all of one device.
    """
    phases = dict.fromkeys(phase for units in devices for unit in units for phase in unit)
    longest = {phase: max(sum(unit[phase] for unit in units) for units in devices) for phase in phases}
    if not ahead:
        return sum(longest.values())
    generation = longest.pop("generation")
    return max(generation, sum(longest.values()), *(sum(sum(unit.values()) for unit in units) for units in devices))
