"""`collm tasks`, `collm algorithms`, `collm check`."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from collm.envs.catalogue import ENVIRONMENTS, EnvSpec, find, make
from collm.envs.check import check_env
from collm.errors import CollmError, ConfigError
from collm.settings.presets import ALGORITHMS


def tasks(arguments: argparse.Namespace) -> int:
    rows = {name: describe_task(name) for name in ENVIRONMENTS}
    if arguments.json:
        print(json.dumps(rows, default=str))
        return 0
    for name, row in rows.items():
        facts = [f"{key}: {', '.join(row[key])}" if key == "agents" else f"{key}: {row[key]}" for key in FACTS if key in row]
        facts += [f"cannot be made on this machine: {row['refused']}"] if "refused" in row else []
        options = [f"env.{key}={value!r}" for key, value in row["options"].items()]
        print(f"{name:<20} {row['about']}")
        for items in (facts, options):
            print("\n".join(_wrapped(items)))
        print()
    return 0


FACTS = ("agents", "turns", "tasks", "max_reward")


def describe_task(name: str) -> dict[str, Any]:
    """The first sentence of an environment's docstring, its options with their defaults, and with these options its agents,
    turns, number of training tasks and greatest reward, or the reason why it cannot be made."""
    world = find(name)
    options = {
        key: None if p.default is p.empty else p.default
        for key, p in inspect.signature(world).parameters.items()
        if key != "split" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    row: dict[str, Any] = {"about": _first_sentence(inspect.getdoc(world) or ""), "options": options}
    try:
        env: Any = make(name)
    except CollmError as error:
        return {**row, "refused": str(error)}
    found = {"agents": list(env.possible_agents)}
    for key, attribute in (("turns", "turns"), ("tasks", "num_tasks"), ("max_reward", "max_reward")):
        if hasattr(env, attribute):
            found[key] = getattr(env, attribute)
    return {**row, **found}


def _first_sentence(text: str) -> str:
    """The first sentence of a docstring, on one line."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    sentence, dot, _ = paragraph.partition(". ")
    return sentence + dot.strip()


def _wrapped(items: list[str]) -> list[str]:
    """Items side by side in indented lines of at most 110 characters, without a line break inside an item."""
    lines = [""]
    for item in items:
        if lines[-1] and len(lines[-1]) + len(item) + 2 > 106:
            lines.append("")
        lines[-1] += f"  {item}" if lines[-1] else item
    return [f"    {line}" for line in lines if line]


def algorithms(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({name: {"about": preset.about, "settings": preset.settings()} for name, preset in ALGORITHMS.items()}))
        return 0
    for name, preset in ALGORITHMS.items():
        print(f"{name:<15} {preset.about}")
        print(" " * 16 + "  ".join(f"{key}={value!r}" for key, value in preset.settings().items()) + "\n")
    print("critic.body='auto' adds a language model as critic to those whose V is a regression alone (critic.body='none').")
    return 0


def check(arguments: argparse.Namespace) -> int:
    foreign = [key for key in arguments.overrides if not key.startswith("env.")]
    if foreign:
        raise ConfigError(f"unknown setting {foreign[0]!r}: `collm check` takes the environment's options, --env.OPTION value.")
    options = {key.removeprefix("env."): value for key, value in arguments.overrides.items()}
    if "name" in options:
        raise ConfigError(f"`collm check` takes the environment as its argument: collm check {options['name']}")
    passed = check_env(EnvSpec(arguments.env, options).make())
    if arguments.json:
        print(json.dumps({"env": arguments.env, "passed": passed}))
        return 0
    print("\n".join(f"ok  {name}" for name in passed))
    return 0
