"""Episodes as plain JSON values and back, to the bit: a checkpoint holds those that were played ahead. Nothing is pickled."""

from __future__ import annotations

import base64
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np

from collm.types import Group

GROUPS = list[Group]


def plain(value: Any) -> Any:
    """A record of `collm.types`, or a container of some, as values that JSON has; an array becomes its bytes in base64."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, np.ndarray):
        return base64.b64encode(value.tobytes()).decode()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def read(kind: Any, value: Any) -> Any:
    """What `plain` was given, of this type.

    Example: read(GROUPS, json.loads(json.dumps(plain(groups))))
    Raises KeyError, TypeError or ValueError for values of another shape.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        (kind,) = (one for one in inner if one is not type(None))
        return None if value is None else read(kind, value)
    if is_dataclass(kind):
        record: Any = kind
        return record(**{name: read(one, value[name]) for name, one in _kinds(record).items()})
    if origin is np.ndarray:
        (number,) = typing.get_args(inner[1])
        return np.frombuffer(base64.b64decode(value), dtype=number).copy()
    if origin in (list, tuple):
        return origin(read(inner[0], one) for one in value)
    if origin in (dict, Mapping):
        return {key: read(inner[1], one) for key, one in value.items()}
    return value


@cache
def _kinds(record: Any) -> dict[str, Any]:
    """Field -> its type."""
    return typing.get_type_hints(record)
