"""A seat: one unit of the blueprint in a process of its own. Without ray."""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import socket
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from collm.engines.base import Engine
from collm.errors import CollmError
from collm.learning.parts import Part
from collm.machine import memory
from collm.models.team import Team
from collm.planning.memory import gpu_memories
from collm.runs.heap import HEAP
from collm.types import Completion, Request

Bytes = dict[str, bytes]
"""File name -> content."""


@dataclass(slots=True)
class Contents:
    """What a seat holds. A critic alone has no team and no engine."""

    team: Team | None
    engine: Engine | None
    parts: Sequence[Part]
    """In the order of `Blueprint.parts`."""


@dataclass(frozen=True, slots=True)
class Failed:
    """An error of a seat, sent instead of an answer and raised by the driver."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Machine:
    """What a node of the cluster has."""

    versions: dict[str, str]
    """Of what must be the same everywhere: Python, torch, and collm by a hash of its source."""
    memory: int
    """Bytes; 0 if unknown."""
    gpus: list[int]
    """Bytes of each GPU."""


def machine() -> Machine:
    """What this machine has."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        source.update(path.read_bytes())
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "collm's source": source.hexdigest()[:12]}
    return Machine(versions, memory() or 0, gpu_memories())


def _portable(error: Exception) -> Exception:
    """The error itself, or one with its message and notes if another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        plain = RuntimeError(f"{type(error).__name__}: {error}")
        for note in getattr(error, "__notes__", ()):
            plain.add_note(note)
        return plain
    return error


class Seat:
    """One unit of the blueprint. Its methods are called by name through `ask`, one at a time."""

    def __init__(self) -> None:
        self.held = Contents(None, None, ())
        self.received: Bytes = {}

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method. Returns its result, or its error as `Failed`, with the traceback as a note of an unexpected one."""
        try:
            return getattr(self, method)(*arguments)
        except Exception as error:
            if not isinstance(error, CollmError):
                error.add_note(f"in the process of a seat:\n{traceback.format_exc()}")
            return Failed(_portable(error.with_traceback(None)))

    def follow(self, method: str, *arguments: Any) -> None:
        """Call a method of a rank whose result is that of the first rank."""
        getattr(self, method)(*arguments)

    def free_port(self) -> int:
        """The number of a port on which the ranks of a unit can meet."""
        with socket.socket() as found:
            found.bind(("", 0))
            return int(found.getsockname()[1])

    def started(self) -> int:
        """The number of the process, once it runs."""
        return os.getpid()

    def fill(self, make: Callable[[], Contents]) -> int:
        """Load the unit. Returns the size of the largest vocabulary of its policies, 0 without any."""
        self.held = make()
        return 0 if self.held.team is None else self.held.team.vocabulary

    def parts(self, method: str, arguments: Sequence[Any]) -> list[Any]:
        """Call a method of every part; returns the results in the order of the parts."""
        found = [getattr(part, method)(*arguments) for part in self.held.parts]
        if method == "learn":
            HEAP.iterated()
        return found

    def files(self) -> list[list[str]]:
        """Names of the checkpoint files of every part."""
        return [list(part.tensors()) for part in self.held.parts]

    def tensors(self, name: str) -> bytes:
        """One checkpoint file, as safetensors."""
        return next(save(files[name]) for part in self.held.parts if name in (files := part.tensors()))

    def receive(self, name: str, data: bytes) -> None:
        """Keep a checkpoint file for `restore`."""
        self.received[name] = data

    def restore(self) -> None:
        """Load the files that were received. Raises ValueError if they do not fit."""
        try:
            for part in self.held.parts:
                part.restore(lambda name: load(self.received.pop(name)))
        finally:
            self.received.clear()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer requests to agents of this seat."""
        assert self.held.engine is not None
        return self.held.engine.generate(requests)

    def renew(self) -> None:
        """Later answers are those of the present weights."""
        if self.held.engine is not None and self.held.team is not None:
            self.held.engine.load(self.held.team)

    def rest(self) -> None:
        """Release the engine's memory for the learner."""
        if self.held.engine is not None:
            self.held.engine.rest()

    def close(self) -> None:
        """Close the engine, whose server and files would outlive the process."""
        if self.held.engine is not None:
            self.held.engine.close()

    def saved(self, agent: str) -> Bytes:
        """The files of an agent's Hugging Face folder."""
        assert self.held.team is not None
        with tempfile.TemporaryDirectory(prefix="collm-seat-") as folder:
            self.held.team.policies[agent].save(Path(folder))
            files = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
