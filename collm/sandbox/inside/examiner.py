"""The examiner: a process that runs a check, with proxies for the program's definitions.

The check and its set-up are trusted. The program runs in another process, and its answers are decoded into plain values. Names
that the check reads and that are not defined here refer to the program.
"""

from __future__ import annotations

import builtins
import importlib
import random
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from values import LARGEST, OPERATIONS, decode, encode, receive, send  # type: ignore[import-not-found]

_WORDS = 400


class Ended(Exception):
    """The program raised at its top level, or its process ended."""


def examine(setup: str, check: str, entries: Iterable[str], ask: Callable[..., Any]) -> None:
    """Run set-up and check; returns if neither raises.

    Args: entries: names that the check expects the program to define. ask: the `connection` to the player.
    """
    random.seed(0)
    if "numpy" in setup + check and "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    module = types.ModuleType("check")
    sys.modules["check"] = sys.modules["__main__"] = module
    names = module.__dict__
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), names)
    code = compile(check, "check.py", "exec", dont_inherit=True)
    examiner = Examiner(ask)
    names |= examiner.proxies(entries)
    exec(code, names)


class Remote:
    """A proxy of a program's object, whose attributes are read, set and called in the player. It equals only itself."""

    def __getattr__(self, attribute: str) -> Any:
        return self.__dict__["_examiner"].get(self.__dict__["_target"], attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        self.__dict__["_examiner"].put(self.__dict__["_target"], attribute, value)


class Method:
    """A method of an object or a class of the program."""

    def __init__(self, examiner: Examiner, target: Any, name: str):
        self.examiner, self.target, self.name = examiner, target, name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.examiner.call(self.target, self.name, arguments, named)


class Examiner:
    """Represents the program: sends requests to the player and makes proxies for the program's definitions."""

    def __init__(self, ask: Callable[..., Any]):
        self.ask = ask
        self.classes: dict[str, type] = {}
        self.made_classes: dict[str, type] = {}
        self.exceptions: dict[str, type] = {}
        self.known: dict[tuple[int, bool], Any] = {}
        self.lent: list[tuple[Any, str, Any, Any]] = []
        """Mutable attributes that were read: (object, attribute, value here, its JSON when both sides last agreed)."""

    def proxies(self, entries: Iterable[str]) -> dict[str, Any]:
        """A proxy for every entry that the program defines; a module of the standard library is imported here instead."""
        found: dict[str, Any] = {}
        said = self.ask(None)
        defined = said.get("entries") if isinstance(said, dict) else None
        if not isinstance(defined, dict):
            raise Ended(_words(said.get("ended") if isinstance(said, dict) else None))
        for name in entries:
            kind = defined.get(name)
            if not isinstance(kind, dict) or "other" in kind:
                module = _module(name)
                if module is not None:
                    found[name] = module
            elif "class" in kind:
                found[name] = self._exception(name) if kind["class"] is True else self._class(name, kind.get("operations", ()))
            elif "value" in kind:
                found[name] = decode(kind["value"], self.instance)
            else:
                found[name] = self._function(name)
        return found

    def _function(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return self.call(None, name, arguments, named)

        call.__name__ = call.__qualname__ = name
        return call

    def _class(self, name: str, operations: Any) -> type:
        """A proxy class whose instances are the program's objects.

        Only instances that the check has made support operations such as len(). Objects returned by a call have only
        attributes, since an answer could otherwise claim to contain every value that the check looks for.
        """
        examiner = self

        class Kind(type):
            def __call__(cls, *arguments: Any, **named: Any) -> Any:
                return examiner.call(None, name, arguments, named, made=True)

            def __getattr__(cls, attribute: str) -> Any:
                return examiner.get(["class", name], attribute)

        def operation(called: str) -> Callable[..., Any]:
            def run(instance: Any, *arguments: Any) -> Any:
                found = examiner.call(instance.__dict__["_target"], called, arguments, {})
                return iter(found) if called == "__iter__" else found

            return run

        self.classes[name] = Kind(name, (Remote,), {"__module__": "solution"})
        offered = {str(called): operation(str(called)) for called in operations if str(called) in OPERATIONS}
        self.made_classes[name] = Kind(name, (self.classes[name],), {"__module__": "solution", **offered})
        return self.classes[name]

    def _exception(self, name: str) -> type:
        self.exceptions[name] = type(name, (Exception,), {"__module__": "solution"})
        return self.exceptions[name]

    def instance(self, kind: str, body: Any, *, made: bool = False) -> Any:
        """The proxy of an object of the program, the same one each time."""
        if kind != "h":
            raise ValueError("not a value")
        number, name = int(body[0]), str(body[1])
        key = number, made
        if key not in self.known:
            cls = (self.made_classes if made else self.classes)[name] if name else Remote
            proxy: Any = object.__new__(cls)
            proxy.__dict__.update(_examiner=self, _target=["h", [number, name]])
            self.known[key] = proxy
        return self.known[key]

    def number(self, value: Any) -> Any:
        """The JSON for what the program is to take for its own object; for a function of a module, where that is."""
        if isinstance(value, Remote):
            kind, body = value.__dict__["_target"]
            return {kind: body}
        if isinstance(value, Method):
            return {"m": [value.target, value.name]}
        for name, cls in self.classes.items():
            if value is cls:
                return {"class": name}
        if isinstance(value, (types.BuiltinFunctionType, types.FunctionType, type)) and getattr(value, "__module__", None):
            return {"fn": [value.__module__, value.__qualname__]}
        owner = getattr(value, "__self__", None)
        if isinstance(owner, type):
            return {"fn": [owner.__module__, f"{owner.__qualname__}.{value.__name__}"]}
        return None

    def call(self, target: Any, name: str, arguments: tuple[Any, ...], named: Mapping[str, Any], *, made: bool = False) -> Any:
        here = list(arguments), dict(named)
        self._return_lent()
        said = self.ask(["call", target, name, encode(here[0], self.number), encode(here[1], self.number)])
        result = self._result(said, made=made)
        if "changed" in said:
            positional, by_name = (decode(theirs, self.instance) for theirs in said["changed"])
            for mine, theirs in zip(here[0], positional, strict=True):
                _become(mine, theirs)
            for name in here[1]:
                _become(here[1][name], by_name[name])
        self._refresh_lent()
        return result

    def get(self, target: Any, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        for owner, attribute, value, _ in self.lent:
            if owner == target and attribute == name:
                return value
        said = self.ask(["get", target, name])
        if isinstance(said, dict) and "method" in said:
            return Method(self, target, name)
        value = self._result(said)
        if isinstance(value, (list, dict, set)):
            self.lent.append((target, name, value, said["result"]))
        return value

    def put(self, target: Any, name: str, value: Any) -> None:
        self.lent = [entry for entry in self.lent if entry[:2] != (target, name)]
        self._result(self.ask(["set", target, name, encode(value, self.number)]))

    def _return_lent(self) -> None:
        """Copy the check's changes of attributes that it had read to the program's objects."""
        for place, (target, name, value, known) in enumerate(self.lent):
            coded = encode(value, self.number)
            if coded != known:
                self._result(self.ask(["set", target, name, coded]))
                self.lent[place] = (target, name, value, coded)

    def _refresh_lent(self) -> None:
        """Copy a call's changes of attributes that the check had read to the check's values."""
        for place, (target, name, value, known) in enumerate(self.lent):
            said = self.ask(["get", target, name])
            if isinstance(said, dict) and "result" in said and said["result"] != known:
                _become(value, decode(said["result"], self.instance))
                self.lent[place] = (target, name, value, said["result"])

    def _result(self, said: Any, *, made: bool = False) -> Any:
        if isinstance(said, dict) and "result" in said:
            coded = said["result"]
            if made and isinstance(coded, dict) and list(coded) == ["h"]:
                return self.instance("h", coded["h"], made=True)
            return decode(coded, self.instance)
        if isinstance(said, dict) and "raised" in said:
            raise self._raised(said["raised"])
        raise Ended

    def _raised(self, said: Any) -> BaseException:
        """The exception that the program raised: of the first of its classes that is known here; of no other kind."""
        kinds, words = str(said[0]).split(), str(said[1])
        own = kinds[0][:60] if kinds and kinds[0].isidentifier() else "an exception"
        for name in kinds:
            kind = self.exceptions.get(name) or getattr(builtins, name, None)
            if isinstance(kind, type) and issubclass(kind, Exception):
                try:
                    return (kind if name == own else type(own, (kind,), {"__module__": "builtins"}))(words)
                except Exception:  # some need more than words
                    break
        return type(own, (RuntimeError,), {"__module__": "builtins"})(words)


def connection(asked: int, said: int) -> Callable[..., Any]:
    """`ask(message)`, which sends a message (None: nothing) and returns the player's answer, or None if the player ended."""

    def ask(message: Any) -> Any:
        try:
            if message is not None:
                send(asked, message)
            return receive(said, LARGEST)
        except BrokenPipeError:
            return None

    return ask


def _become(mine: Any, theirs: Any) -> None:
    """Give a list, dict or set here the contents that the program gave it there."""
    if type(mine) is list and type(theirs) is list:
        mine[:] = theirs
    elif type(mine) in (dict, set) and type(mine) is type(theirs):
        mine.clear()
        mine.update(theirs)


def _module(name: str) -> Any:
    """A module of the standard library, or numpy, by its own name."""
    if name in sys.stdlib_module_names or name == "numpy":
        try:
            return importlib.import_module(name)
        except ImportError:
            return None
    return None


def _words(said: Any) -> str:
    if isinstance(said, list) and len(said) == 2:
        kind = str(said[0]).split(" ")[0]
        return f"{kind}: {said[1]}" if said[1] else kind
    return ""


def last_line(error: BaseException) -> str:
    """An exception in one line. For a program that ended, its last exception, or "" if its process ended without one."""
    try:
        if isinstance(error, Ended):
            return str(error)[:_WORDS]
        text = str(error)[:_WORDS]
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    except Exception:
        return "an exception"
