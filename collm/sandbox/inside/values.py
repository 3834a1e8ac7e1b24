"""Plain values that are exchanged between the player and the examiner, and the frames that carry them.

A frame is four bytes of length, big endian, then JSON. A value crosses by its exact type: None, bool, int, float, complex, str,
bytes, list, tuple, set, frozenset, dict, built-in types, dates, times, decimals and deques of the standard library, numbers
and arrays of numpy. A subclass of dict arrives as a dict. Each side decides which other values, such as handles of objects, can
cross. Therefore no definition of a program, such as its own `__eq__`, reaches the examiner.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import decimal
import fractions
import importlib
import json
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

LARGEST = 16 << 20
"""Greatest size of one message from the player in bytes."""
DEEPEST = 100
OPERATIONS = (
    "__getitem__", "__setitem__", "__delitem__", "__len__", "__iter__", "__contains__", "__call__", "__enter__", "__exit__",
)  # fmt: skip
"""Operations that a class under test may define. Equality is not among them: only plain values are compared."""
_SMALL = 1 << 53
_SEQUENCES: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset, "q": collections.deque}
_BY_TYPE = {kind: name for name, kind in _SEQUENCES.items()}
_ISO: dict[str, Any] = {"date": datetime.date, "datetime": datetime.datetime, "time": datetime.time}
_TEXT: dict[str, Any] = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}


class NotPlain(TypeError):
    """A value of a type that cannot be exchanged."""


def encode(value: Any, handle: Callable[[Any], Any], depth: int = 0) -> Any:
    """JSON for a value; `handle(value)` gives the JSON for an object that stays where it is, or None. Raises NotPlain."""
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if kind is int:
        return value if -_SMALL < value < _SMALL else {"i": hex(value)}
    if kind is float:
        return {"f": value.hex()}
    if depth > DEEPEST:
        raise NotPlain(f"a value nested more than {DEEPEST} deep")
    if kind in _BY_TYPE:
        return {_BY_TYPE[kind]: [encode(item, handle, depth + 1) for item in value]}
    if isinstance(value, dict):
        items = [[encode(k, handle, depth + 1), encode(v, handle, depth + 1)] for k, v in dict.items(value)]
        return {"d": items}
    if kind is bytes:
        return {"b": value.hex()}
    if kind is complex:
        return {"c": [value.real.hex(), value.imag.hex()]}
    if kind is datetime.timedelta:
        return {"delta": [value.days, value.seconds, value.microseconds]}
    for name, known in _ISO.items():
        if kind is known:
            return {name: value.isoformat()}
    for name, known in _TEXT.items():
        if kind is known:
            return {name: str(value)}
    if isinstance(value, type) and getattr(builtins, getattr(value, "__name__", ""), None) is value:
        return {"type": getattr(value, "__name__", "")}
    if kind.__module__ == "numpy":
        array = sys.modules["numpy"].asarray(value)
        if array.dtype.kind in "biufc":
            flat = encode(array.ravel().tolist(), handle, depth + 1)
            return {"n": [str(array.dtype), list(array.shape), flat]} if kind.__name__ == "ndarray" else flat["l"][0]
    named = handle(value)
    if named is None:
        raise NotPlain(f"a value of type {str(kind.__name__)[:40]}, which is not a plain one")
    return named


def decode(coded: Any, handle: Callable[[str, Any], Any]) -> Any:
    """The inverse of `encode`; `handle(kind, body)` returns values that are not plain. Raises ValueError or TypeError."""
    if coded is None or type(coded) in (bool, str, int):
        return coded
    if type(coded) is not dict or len(coded) != 1:
        raise ValueError("not a value")
    ((name, body),) = coded.items()
    if name in _SEQUENCES:
        return _SEQUENCES[name](decode(item, handle) for item in _listed(body))
    if name == "d":
        return {decode(key, handle): decode(value, handle) for key, value in _listed(body)}
    if name == "i":
        return int(body, 16)
    if name == "f":
        return float.fromhex(body)
    if name == "b":
        return bytes.fromhex(body)
    if name == "c":
        real, imaginary = _listed(body)
        return complex(float.fromhex(real), float.fromhex(imaginary))
    if name == "delta":
        days, seconds, microseconds = _listed(body)
        return datetime.timedelta(days, seconds, microseconds)
    if name in _ISO:
        return _ISO[name].fromisoformat(body)
    if name in _TEXT:
        return _TEXT[name](body)
    if name == "type":
        found = getattr(builtins, str(body))
        if type(found) is not type:
            raise ValueError("not a type")
        return found
    if name == "n":
        dtype, shape, flat = _listed(body)
        numpy = importlib.import_module("numpy")
        if numpy.dtype(str(dtype)).kind not in "biufc":
            raise ValueError("not an array of numbers")
        return numpy.array(decode(flat, handle), dtype=str(dtype)).reshape([int(side) for side in _listed(shape)])
    return handle(name, body)


def _listed(body: Any) -> list[Any]:
    if type(body) is not list:
        raise ValueError("not a list")
    return body


def receive(descriptor: int, largest: int = 1 << 31) -> Any:
    """The next message, or None if the other side ended. Raises ValueError for one that is too large or not JSON."""
    head = _read(descriptor, 4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack(">I", head)
    if size > largest:
        raise ValueError(f"a message of more than {largest >> 20} MiB")
    body = _read(descriptor, size)
    return json.loads(body) if len(body) == size else None


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def send(descriptor: int, message: Any) -> None:
    body = json.dumps(message).encode()
    rest = memoryview(struct.pack(">I", len(body)) + body)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
