"""`collm plan --cluster`: which unit is on which device, what bounds an iteration, and which setting would help most."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from collm.cli.plan import gib, words
from collm.errors import ConfigError
from collm.planning.advise import SAME
from collm.planning.memory import Plan
from collm.reports.screen import Screen
from collm.settings.rooms import Config

ARITHMETIC = "by arithmetic on products of weights; not measured"
MEMORY = ("peak_bytes", "held_bytes", "phases")


def show(config: Config, limit: int | None, arguments: argparse.Namespace) -> int:
    """Print the plan for devices of `limit` bytes. Exit code 0 if a number of them holds the run, 1 if a unit is too large."""
    from collm.cluster.outlook import helpful, outlook, way_out

    if limit is None:
        raise ConfigError("the memory of the cluster's devices is unknown here. Give it: --memory 80GB.")
    if arguments.measure or arguments.generated_per_second or arguments.updated_per_second:
        raise ConfigError("--cluster plans by arithmetic alone. Leave out --measure and tokens per second.")
    found = outlook(config, limit)
    fewer, shorter = helpful(config, limit, found) if found.devices else (None, None)
    unit, phase, share = found.widest
    plain: dict[str, Any] = {
        "memory_bytes": limit,
        "devices": [list(units) for units in found.devices],
        "units": {name: {key: plan.plain()[key] for key in MEMORY} for name, plan in found.plans.items()},
        "bound": {"unit": unit, "phase": phase, "fraction": share},
    }
    if found.devices:
        plain["speed_up_by_arithmetic"], plain["speed_up_with_a_device_each"] = found.speed_ups
        plain["fewest_devices"] = fewer and {"settings": fewer[0], "devices": len(fewer[1].devices)}
        plain["shortest_iteration"] = shorter and {"settings": shorter[0], "times": found.duration / shorter[1].duration}
        said = [_devices(len(found.devices), limit)]
    else:
        plain["would_fit"] = would = way_out(config, limit)
        wide = max(found.plans, key=lambda name: found.plans[name].peak)
        said = [
            f"{wide} needs {gib(found.plans[wide].peak)} GiB and does not fit on a device of {gib(limit)} GiB. "
            + (f"Each unit fits with {words(would)}" if would else "Choose a smaller model or shorter answers.")
        ]
    said.append(f"An iteration waits most for {unit} in its {phase}: {share:.0%} of the time with a device for each unit.")
    if found.devices:
        here, each = found.speed_ups
        more = f", {each:.2f} with a device for each unit" if len(found.devices) < len(found.plans) else ""
        said.append(f"Iterations are {here:.2f} times as fast as on one device{more} ({ARITHMETIC}).")
    if fewer:
        said.append(f"Fewest devices: {words(fewer[0])} (then {len(fewer[1].devices)}{_changes(fewer[0])}).")
    if shorter:
        times = found.duration / shorter[1].duration
        said.append(f"Shortest iteration: {words(shorter[0])} (then {times:.2f} times as fast as now{_changes(shorter[0])}).")
    if arguments.json:
        print(json.dumps(plain))
        return 0 if found.devices else 1
    console = Screen()
    for number, units in enumerate(found.devices or [(name,) for name in found.plans], 1):
        console.print(_table(f"device {number}", {name: found.plans[name] for name in units}, limit))
    console.print("", *said, sep="\n", soft_wrap=True)
    return 0 if found.devices else 1


def _changes(settings: Mapping[str, Any]) -> str:
    return "" if settings.keys() <= SAME else "; it changes results"


def _devices(number: int, limit: int) -> str:
    return f"{number} device{'s' * (number > 1)} of {gib(limit)} GiB {'are' if number > 1 else 'is'} needed."


def _table(title: str, plans: dict[str, Plan], limit: int) -> Table:
    """The memory of the units on one device: what each holds, and its largest phase."""
    table = Table(title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    for name in ("unit", "when", "what"):
        table.add_column(name)
    table.add_column("GiB", justify="right")
    for unit, found in plans.items():
        for name, size in found.held.items():
            table.add_row(unit, "always", name, gib(size))
        for name, size in found.largest.parts.items():
            if size:
                table.add_row(unit, found.largest.name, name, gib(size))
    table.add_row("", "", f"total, of {gib(limit)}", gib(sum(found.peak for found in plans.values())))
    return table
