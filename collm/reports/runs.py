"""Reads run directories. Every failure is a RunError that names the file, the reason and the way out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.errors import RunError, SaveError

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A run directory as it stands: settings, and one record per iteration (the first, number 0, is before training)."""

    folder: Path
    config: Record
    metrics: list[Record]

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def planned(self) -> int:
        """Iterations the run is to have."""
        return int(self.config["run"]["iterations"])

    def evaluations(self) -> dict[int, Path]:
        """Iterations after which the held-out tasks were played, in order, with their episodes' file."""
        suffix = "-evaluation.jsonl"
        found = sorted((self.folder / "episodes").glob(f"*{suffix}"))
        return {int(path.name[: -len(suffix)]): path for path in found if path.name[: -len(suffix)].isdigit()}

    def training_episodes(self) -> dict[int, Path]:
        """Iterations of which training episodes were kept, in order, with their file."""
        found = sorted((self.folder / "episodes").glob("*.jsonl"))
        return {int(path.stem): path for path in found if path.stem.isdigit()}

    def cost(self) -> dict[str, Any]:
        """What training took so far: joint actions, seconds without evaluations, tokens that the agents sampled."""
        seconds = [record.get(name) or 0.0 for record in self.metrics for name in ("seconds/collect", "seconds/learn")]
        return {
            "joint_actions": self.metrics[-1]["joint_actions"] if self.metrics else 0,
            "seconds": round(math.fsum(seconds), 3),
            "tokens": sum(record.get("tokens/sampled") or 0 for record in self.metrics),
        }


def read_run(folder: Path) -> Run:
    """Raises RunError where `folder` is no run directory, or a file of it is damaged."""
    config = read_config(folder)
    return Run(folder, config, _read_lines(folder / "metrics.jsonl", ("iteration", "joint_actions")))


def read_config(folder: Path) -> Record:
    """The settings a run began with, as plain values. Raises RunError."""
    if not folder.is_dir():
        raise RunError(f"there is no run {str(folder)!r}: the folder does not exist.")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
        _ = int(config["run"]["iterations"]), config["env"]["name"], config["algorithm"]["name"]
    except FileNotFoundError as error:
        raise RunError(f"{str(folder)!r} is not a run directory: it holds no config.json.") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error!r}. Restore it, or train the run anew.") from error
    return config


def read_episodes(path: Path) -> list[Record]:
    """Episodes as they were kept, failed ones too. Raises RunError where the file is damaged."""
    return _read_lines(path, ("task", "label", "score", "metrics", "failure", "state", "turns"))


def read_evaluation(path: Path) -> list[Record]:
    """The held-out episodes that were played to their end, one record each. Raises RunError where there is none."""
    episodes = read_episodes(path)
    played = [episode for episode in episodes if not episode["failure"] and episode["score"] is not None]
    if not played:
        raise RunError(f"{str(path)!r} holds no held-out episode that was played to its end; see `failure` in it.")
    return played


def _read_lines(path: Path, required: Iterable[str]) -> list[Record]:
    """JSON objects, one a line; a last line that is still being written is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            missing = [key for key in required if key not in record]
            if missing or not isinstance(record, dict):
                raise ValueError(f"it lacks {', '.join(missing)}")
        except (ValueError, TypeError) as error:
            raise RunError(
                f"{str(path)!r}, line {number}, is damaged: {error}. Restore the file, or train the run anew."
            ) from error
        records.append(record)
    return records


@contextmanager
def saved(path: Path) -> Iterator[None]:
    """Make the folder of a file about to be written. Raises SaveError where that, or the writing, fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise SaveError(
            f"cannot write {path}: {error.strerror or error}. Make room, or mend the folder's permissions."
        ) from error
