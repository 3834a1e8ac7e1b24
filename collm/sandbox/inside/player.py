"""The player: a process that runs the program and then answers calls of its definitions. It never holds a check.

The program can replace any part of this process, so its answers are not trusted: the examiner accepts only plain values.
"""

from __future__ import annotations

import importlib
import random
import sys
import types
from collections.abc import Sequence
from typing import Any

from values import OPERATIONS, NotPlain, decode, encode, receive, send  # type: ignore[import-not-found]

_WORDS = 300
METHODS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)


def play(program: str, entries: Sequence[str], asked: int, said: int) -> None:
    """Runs the program as a module named "solution", so that classes pickle and dataclasses find their module; code below
    `if __name__ == "__main__"` does not run. Says which entries it defines, then answers until the examiner has gone."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = sys.modules["__main__"] = module
    sys.argv[:] = ["solution.py"]
    random.seed(0)
    if "numpy" in program and "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    try:
        exec(compile(program, "solution.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        send(said, {"ended": describe(error)})
        return
    Player(module.__dict__, entries).answer(asked, said)


class Player:
    """Executes the examiner's requests on the program's objects, which are identified by numbers."""

    def __init__(self, names: dict[str, Any], entries: Sequence[str]):
        self.names, self.entries = names, entries
        self.classes = {names[name]: name for name in entries if isinstance(names.get(name), type)}
        self.reading = False
        self.objects: list[Any] = []

    def answer(self, asked: int, said: int) -> None:
        send(said, {"entries": {name: self.kind(name) for name in self.entries if name in self.names}})
        while (request := receive(asked)) is not None:
            try:
                reply = self.do(*request)
            except BaseException as error:
                reply = {"raised": describe(error)}
            send(said, reply)

    def kind(self, name: str) -> Any:
        """The kind of an entry: a class with its bases among the built-in exceptions, a callable, or a plain value."""
        value = self.names[name]
        if isinstance(value, type):
            operations = [
                name for name in OPERATIONS if name in value.__dict__ or (name == "__iter__" and hasattr(value, name))
            ]
            return {"class": issubclass(value, BaseException), "operations": operations}
        if callable(value):
            return {"call": True}
        try:
            return {"value": encode(value, self.handle)}
        except BaseException:
            return {"other": True}

    def do(self, what: str, target: Any, name: str, *rest: Any) -> Any:
        """call: a function, a class or a method; get, set: an attribute."""
        owner = None if target is None else self.object(*target)
        if what == "set":
            setattr(owner, name, decode(rest[0], self.object))
            return {"result": None}
        if what == "get":
            found = getattr(owner, name)
            if isinstance(found, METHODS):
                return {"method": True}
            self.reading = True  # an attribute may be any object; what a call returns may not
            try:
                return {"result": encode(found, self.handle)}
            finally:
                self.reading = False
        arguments, named = decode(rest[0], self.object), decode(rest[1], self.object)
        called = self.names[name] if owner is None else getattr(owner, name)
        result = called(*arguments, **named)
        if name == "__iter__":
            result = list(result)
        reply = {"result": encode(result, self.handle)}
        try:
            after = [encode(arguments, self.handle), encode(named, self.handle)]
        except NotPlain:  # an argument was a function or an object: that is not sent back
            return reply
        return reply if after == list(rest) else {**reply, "changed": after}

    def handle(self, value: Any) -> Any:
        """The number and class of an instance of a class that the checks name; for an attribute's value, of any object."""
        name = self.classes.get(type(value), "")
        if not name and not self.reading:
            return None
        for number, known in enumerate(self.objects):
            if known is value:
                return {"h": [number, name]}
        self.objects.append(value)
        return {"h": [len(self.objects) - 1, name]}

    def object(self, kind: str, body: Any = None) -> Any:
        """The target that the examiner names: an object by number, its method, a class by name, or a function of a module."""
        if kind == "h":
            return self.objects[body[0]]
        if kind == "m":
            return getattr(self.object(*body[0]), body[1])
        if kind == "class":
            return self.names[body]
        found = importlib.import_module(body[0])
        for part in body[1].split("."):
            found = getattr(found, part)
        return found


def describe(error: BaseException) -> list[str]:
    """[names of the exception's classes, its own first, joined; its message]."""
    kinds, words = "an exception", ""
    try:
        kinds = " ".join(kind.__name__ for kind in type.__getattribute__(type(error), "__mro__"))[:_WORDS]
        words = str(error)[:_WORDS]
    except BaseException:
        words = ""
    return [str(kinds), words]
