"""Parses recipes, overrides and the config.json of run directories into a Config."""

from __future__ import annotations

import datetime
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from collm.errors import ConfigError
from collm.settings import former
from collm.settings.checks import near
from collm.settings.presets import ALGORITHMS
from collm.settings.rooms import TABLES, Config


def load_config(recipe: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read a recipe and apply overrides `{"room.key": value}`. Raises ConfigError with setting, reason and way out."""
    values: dict[str, Any] = {}
    if recipe is not None:
        try:
            values = tomllib.loads(Path(recipe).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"recipe {str(recipe)!r} cannot be read: {error.strerror}.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {str(recipe)!r} is not valid TOML: {error}.") from error
    apply_overrides(values, overrides or {})
    return parse_config(values)


def apply_overrides(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Set `{"room.key": value}` in nested plain values. Raises ConfigError if a value is where a table is needed."""
    for key, value in overrides.items():
        room, _, name = key.partition(".")
        if not isinstance(values.setdefault(room, {}), dict):
            raise ConfigError(f"{room!r} in the recipe must be a table [{room}] of settings.")
        place = values[room]
        *inner, last = name.split(".")
        for part in inner:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigError(f"unknown setting {key!r}: {part!r} is a value, not a table of settings.")
        place[last] = value


def parse_config(values: Mapping[str, Any]) -> Config:
    """A Config from nested plain values, such as parsed TOML or JSON. Raises ConfigError."""
    try:
        return Config.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail) for detail in error.errors())) from error


def parse_resolved(values: Mapping[str, Any]) -> Config:
    """A Config from the output of `resolved()`, also of a former version whose settings had other names."""
    return parse_config(former.translate(values))


def parse_value(text: str, name: str = "") -> Any:
    """Parse a command-line value: as TOML if it is one value (a number, true, a list, quoted text), else as bare text.

    name: the setting; a setting of type text takes 2024 or true as text.
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = parsed["value"]
    if isinstance(value, (str, list)):
        return value
    room, _, key = name.partition(".")
    fields: Any = getattr(Config.model_fields[room].annotation, "model_fields", {}) if room in Config.model_fields else {}
    holds_text = key in fields and fields[key].annotation in (str, str | None)
    bare = len(parsed) > 1 or "#" in text or isinstance(value, (datetime.date, datetime.time))
    return text if bare or holds_text else value


def describe() -> Iterator[tuple[str, str, str]]:
    """(room.key, default, sentence) of every setting, for `--help` and the documentation."""
    for room, field in Config.model_fields.items():
        yield from _describe(room, field.annotation, getattr(ALGORITHMS["collm-cc"], room, {}))


def _describe(room: str, model: Any, preset: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for key, setting in model.model_fields.items():
        name = f"{room}.{key}"
        table = TABLES.get(name)
        if table is None:
            default = "required" if setting.is_required() else json.dumps(preset.get(key, setting.get_default()))
            yield name, default, " ".join((setting.description or "").split())
        else:
            yield from _describe(name, table, {})


def _explain(detail: Any) -> str:
    """One pydantic error as one sentence about one setting."""
    path = [str(part) for part in detail["loc"]]
    name = ".".join(path)
    if detail["type"] == "extra_forbidden" and name in former.NAMES:
        return f"{name} is not a setting any more: {former.NAMES[name]}"
    if detail["type"] == "extra_forbidden":
        known = [key for key, _, _ in describe()]
        names = known if len(path) > 1 else list(Config.model_fields)
        kind = "setting" if len(path) > 1 else "room"
        return f"unknown {kind} {name!r}.{near(name, names) or ' `collm train --settings` lists all settings.'}"
    if detail["type"] == "missing" and name in ("env", "env.name"):
        return "env.name is missing: say which task to train on, for example env.name='str_build'. `collm tasks` lists them."
    if detail["type"] in ("model_type", "dict_type"):
        return f"{name}={detail['input']!r} is one value; {name} is a table of settings: write [{name}] and one setting a line."
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return message
    return f"{name}={detail['input']!r}: {message[0].lower()}{message[1:]}."
