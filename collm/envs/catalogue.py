"""Names of the built-in environments, and `make`, which makes any environment from a name and options."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_origin, get_type_hints

from pettingzoo import ParallelEnv
from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from collm.envs import gate
from collm.errors import ConfigError, EnvError

ENVIRONMENTS = {
    "agree": "collm.envs.agree:Agree",
    "str_build": "collm.envs.building.str_build:StrBuild",
    "bridge_build": "collm.envs.building.bridge_build:BridgeBuild",
    "house_build": "collm.envs.building.house_build:HouseBuild",
    "resource_gathering": "collm.envs.gathering.resource_gathering:ResourceGathering",
    "tldr": "collm.envs.writing.writing:Tldr",
    "arxiv": "collm.envs.writing.writing:Arxiv",
    "quote": "collm.envs.quote:Quote",
    "coop_code": "collm.envs.coding.coop_code:CoopCode",
    "class_eval": "collm.envs.coding.class_eval:ClassEval",
}


@dataclass(frozen=True)
class EnvSpec:
    """The name of an environment with its options. `make` returns a new environment for each episode.

    Example: EnvSpec("agree", {"turns": 2})
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, split: str = "train") -> ParallelEnv:
        """A new environment of one split. Raises ConfigError as `make` does."""
        if "split" in self.options:
            raise ConfigError("env.split is not a setting: training plays the split 'train', evaluation the split 'eval'.")
        return make(self.name, split=split, **self.options)


def find(name: str) -> Any:
    """The class or function of an environment, given its name or "module:attribute". Raises ConfigError for an unknown one."""
    target = ENVIRONMENTS.get(name, name)
    if ":" not in target:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"unknown task {name!r}.{hint} `collm tasks` lists the built-in ones; your own is written 'module:Class'."
        )
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(f"task {name!r} cannot be imported: {error}. Is its folder on PYTHONPATH?") from error
    if not _makes_env(found):
        raise ConfigError(
            f"task {name!r} is {type(found).__name__}, not a subclass of ParallelEnv or a function annotated to return one; "
            "it was not called. A function of your own is annotated `-> ParallelEnv`."
        )
    return found


def _makes_env(found: Any) -> bool:
    """Whether `found` is a subclass of ParallelEnv or a Python function annotated to return one. Nothing is called."""
    if not inspect.isclass(found):
        if not inspect.isfunction(found):
            return False
        try:
            found = get_type_hints(found).get("return")
        except (NameError, TypeError, AttributeError, SyntaxError):
            return False
        found = get_origin(found) or found
    return inspect.isclass(found) and issubclass(found, ParallelEnv)


def make(name: str, split: str = "train", **options: Any) -> ParallelEnv:
    """Make an environment, for example `make("str_build", strings=["ICML"])`.

    `name` is a built-in environment or "module:attribute" of any PettingZoo ParallelEnv with text observations and actions.
    Options are checked against the type annotations of the environment's constructor, where it has them.
    Raises ConfigError for an unknown name, an unknown option, or a bad value of an option.
    """
    factory = find(name)
    parameters = inspect.signature(factory).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for option in options:
        if option not in parameters and not open_ended:
            near = difflib.get_close_matches(option, parameters, n=1)
            hint = f"Did you mean 'env.{near[0]}'?" if near else f"{name} takes: {', '.join(parameters)}."
            raise ConfigError(f"unknown setting 'env.{option}'. {hint}")
    _check_types(factory, options)
    options = copy.deepcopy(options)  # an environment may change its arguments
    if "split" in parameters or open_ended:
        options["split"] = split
    try:
        env = factory(**options)
    except EnvError as error:
        raise ConfigError(f"env {name}: {error}") from error
    except TypeError as error:
        raise ConfigError(f"task {name!r} cannot be made with the options {options}: {error}.") from error
    if not isinstance(env, ParallelEnv):
        raise ConfigError(f"task {name!r} makes {type(env).__name__}, not a PettingZoo ParallelEnv.")
    try:
        gate.agents_of(env)
        gate.num_tasks_of(env)
    except EnvError as error:
        raise ConfigError(f"task {name!r}: {error}") from error
    return env


def _check_types(factory: Any, options: Mapping[str, Any]) -> None:
    """Check options against the constructor's annotations, without converting any value. Raises ConfigError."""
    for option, value in options.items():
        adapter = _adapter(factory, option)
        if adapter is not None:
            try:
                adapter.validate_python(value, strict=not isinstance(value, list))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise ConfigError(f"env.{option}={value!r}: {reason[0].lower()}{reason[1:]}.") from error


@cache
def _adapter(factory: Any, option: str) -> TypeAdapter[Any] | None:
    """The type check of one option; None where an annotation is missing or cannot be resolved."""
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
        return TypeAdapter(hints[option]) if option in hints else None
    except (NameError, TypeError, AttributeError, PydanticSchemaGenerationError):
        return None
