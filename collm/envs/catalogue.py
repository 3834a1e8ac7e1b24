"""Names of the built-in worlds, and how any world is made from a name and options."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pettingzoo import ParallelEnv

from collm.errors import ConfigError, EnvError

WORLDS = {
    "agree": "collm.envs.agree:Agree",
    "str_build": "collm.envs.building.str_build:StrBuild",
}


@dataclass(frozen=True)
class EnvSpec:
    """A world by name with its options; `make` gives a fresh one for each episode. Example: EnvSpec("agree", {"turns": 2})"""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, split: str = "train") -> ParallelEnv:
        return make(self.name, split=split, **self.options)


def find(name: str) -> Any:
    """The class (or function) behind a world's name or behind "module:attribute". Raises ConfigError for an unknown one."""
    target = WORLDS.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name, WORLDS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown task {name!r}.{hint} `collm tasks` lists the built-in ones; your own is written 'module:Class'."
        )
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task {name!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error


def make(name: str, split: str = "train", **options: Any) -> ParallelEnv:
    """Make a world, for example `make("str_build", strings=["ICML"])`.

    `name` is a built-in world or "module:attribute" of any PettingZoo ParallelEnv with text observations and actions.
    Raises ConfigError for an unknown name or option, or an option's bad value.
    """
    factory = find(name)
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not open_ended:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"Did you mean 'env.{near[0]}'?" if near else f"{name} takes: {', '.join(parameters)}."
            raise ConfigError(f"unknown setting 'env.{option}'. {hint}")
    if "split" in parameters or open_ended:
        options["split"] = split
    try:
        return factory(**options)
    except EnvError as error:
        raise ConfigError(f"env {name}: {error}") from error
