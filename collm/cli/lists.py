"""`collm tasks`, `collm algorithms`, `collm check`."""

from __future__ import annotations

import argparse
import inspect
import json
from typing import Any

from collm.config import ALGORITHMS
from collm.envs.catalogue import WORLDS, EnvSpec, find
from collm.envs.check import check_env
from collm.errors import ConfigError


def tasks(arguments: argparse.Namespace) -> int:
    rows: dict[str, dict[str, Any]] = {}
    for name in WORLDS:
        world = find(name)
        options = {
            key: None if p.default is p.empty else p.default
            for key, p in inspect.signature(world).parameters.items()
            if key != "split"
        }
        rows[name] = {"about": (inspect.getdoc(world) or "").split("\n")[0], "options": options}
    if arguments.json:
        print(json.dumps(rows))
        return 0
    for name, row in rows.items():
        print(f"{name:<12} {row['about']}")
        print("             " + "  ".join(f"env.{key}={value!r}" for key, value in row["options"].items()) + "\n")
    return 0


def algorithms(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps({name: {"about": about, "settings": values} for name, (about, values) in ALGORITHMS.items()}))
        return 0
    for name, (about, values) in ALGORITHMS.items():
        print(f"{name:<12} {about}")
        print("             " + "  ".join(f"algorithm.{key}={value!r}" for key, value in values.items()) + "\n")
    return 0


def check(arguments: argparse.Namespace) -> int:
    foreign = [key for key in arguments.overrides if not key.startswith("env.")]
    if foreign:
        raise ConfigError(f"unknown setting {foreign[0]!r}: `collm check` takes the world's own options, --env.OPTION value.")
    options = {key.removeprefix("env."): value for key, value in arguments.overrides.items()}
    if "name" in options:
        raise ConfigError(f"`collm check` names the world itself: collm check {options['name']}")
    passed = check_env(EnvSpec(arguments.env, options).make())
    if arguments.json:
        print(json.dumps({"env": arguments.env, "passed": passed}))
        return 0
    print("\n".join(f"ok  {name}" for name in passed))
    return 0
