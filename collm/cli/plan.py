"""`collm plan`: the memory and work that a recipe needs, and settings with which it would fit."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from collm.cli.train import demo_recipe
from collm.errors import ConfigError
from collm.planning.advise import advise
from collm.planning.memory import GIB, Plan, device_memory, plan
from collm.reports.screen import Screen
from collm.settings.load import load_config

UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6}


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if the recipe fits, 1 if it does not."""
    config = load_config(arguments.recipe or demo_recipe(), arguments.overrides)
    if arguments.cluster and config.run.device != "cpu":  # whatever this machine has
        config = config.model_copy(update={"run": config.run.model_copy(update={"device": "cuda"})})
    limit = read_size(arguments.memory) if arguments.memory else device_memory(config.run.device)
    if arguments.cluster:
        from collm.cli.plan_cluster import show

        return show(config, limit, arguments)
    found = plan(config)
    fits = limit is None or found.peak <= limit
    way_out = None if fits or limit is None else advise(config, limit)
    speeds = [arguments.generated_per_second, arguments.updated_per_second]
    if any(speeds) and not all(speeds):
        raise ConfigError("hours need both --generated-per-second and --updated-per-second.")
    hours = found.hours(*speeds) if all(speeds) else None
    measured = None
    if arguments.measure and fits:
        from collm.training.measure import measure

        with Screen(stderr=True).status("loading the team and timing steps"):
            measured = measure(config)
    if arguments.json:
        plain = found.plain() | {"memory_bytes": limit, "fits": fits, "hours": hours}
        plain |= {"measured": measured.plain()} if measured else {}
        plain |= {"would_fit": None if way_out is None else {"settings": way_out[0], "peak_bytes": round(way_out[1].peak)}}
        print(json.dumps(plain))
        return 0 if fits else 1
    console = Screen()
    console.print(memory_table(found), work_table(found, hours), sep="\n")
    if found.work.note:
        console.print(found.work.note)
    console.print(verdict(found, limit, way_out), style="" if fits else "bold", soft_wrap=True)
    if arguments.measure:
        console.print(measured.sentences() if measured else "Nothing was measured, since it does not fit.", soft_wrap=True)
    return 0 if fits else 1


def read_size(text: str) -> int:
    """Bytes of "24GiB", "24GB" or "24" (GiB). Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in UNITS or not float(found[1]):
        raise ConfigError(f"--memory {text!r} is not an amount of memory. Write, for example, --memory 24GB, 24GiB or 800MB.")
    return int(float(found[1]) * UNITS[found[2]])


def memory_table(found: Plan) -> Table:
    table = Table(title="memory", title_justify="left", box=None, pad_edge=False)
    table.add_column("when")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    for name, size in found.held.items():
        table.add_row("always", name, gib(size))
    for phase in sorted(found.phases, key=lambda phase: -phase.total):
        mark = "  <- the peak" if phase is found.largest else ""
        for name, size in phase.parts.items():
            if size:
                table.add_row(phase.name, name, gib(size))
        table.add_row("", f"total during this phase{mark}", gib(sum(found.held.values()) + phase.total))
    return table


def work_table(found: Plan, hours: float | None) -> Table:
    plain = found.plain()
    table = Table(title="\nwork", title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("number", justify="right")
    for name, number in (
        ("iterations", plain["iterations"]),
        ("joint actions", plain["joint_actions"]),
        ("turns replayed with one agent's answer empty (algorithm.teammates), at most", plain["replayed_turns_at_most"]),
        ("tokens generated, at most", plain["generated_tokens_at_most"]),
        ("tokens read in updates, at most", plain["update_tokens_at_most"]),
    ):
        table.add_row(name, f"{number:,}")
    for agent, counts in found.work.prompts.items():
        table.add_row(f"prompt tokens of {agent}, per turn", " ".join(map(str, counts)))
    if hours is not None:
        table.add_row("hours without evaluations, at most", f"{hours:,.1f}")
    return table


def verdict(found: Plan, limit: float | None, way_out: tuple[Mapping[str, Any], Plan] | None) -> str:
    """One sentence: whether it fits, and if not, with which settings it would."""
    peak = f"\nThe peak is {gib(found.peak)} GiB, in {found.largest.name}"
    if limit is None:
        return f"{peak}. The memory of the device is unknown here; give it to compare, for example --memory 24GB."
    if found.peak <= limit:
        return f"{peak}: it fits in {gib(limit)} GiB."
    if way_out is None:
        return (
            f"{peak}: it does not fit in {gib(limit)} GiB, nor with smaller batches, gradient checkpointing and adapters on a "
            "bfloat16 base together. Choose a smaller model, shorter answers (rollout.max_tokens) or fewer turns."
        )
    return f"{peak}: it does not fit in {gib(limit)} GiB. It fits ({gib(way_out[1].peak)} GiB) with {words(way_out[0])}"


def words(settings: Mapping[str, Any]) -> str:
    """Settings as on the command line."""
    return " ".join(f"--{name} {json.dumps(value).strip(chr(34))}" for name, value in settings.items())


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
