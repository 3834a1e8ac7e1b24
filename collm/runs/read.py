"""Reads run directories. Every failure is a RunError that names the file, the reason and the way out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.errors import RunError
from collm.runs.directory import episode_files, read_settings

Record = dict[str, Any]
KINDS: dict[str, Any] = {
    "iteration": int, "joint_actions": int, "task": int, "label": str, "score": (int, float, type(None)), "metrics": dict,
    "failure": str, "state": str, "turns": list,
}  # fmt: skip
"""What a record's value must be for a reader to use it."""


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
        return episode_files(self.folder, evaluation=True)

    def training_episodes(self) -> dict[int, Path]:
        """Iterations of which training episodes were kept, in order, with their file."""
        return episode_files(self.folder, evaluation=False)

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
    config = read_settings(folder)
    return Run(folder, config, read_lines(folder / "metrics.jsonl", ("iteration", "joint_actions")))


def read_episodes(path: Path) -> list[Record]:
    """Episodes as they were kept, failed ones too. Raises RunError where the file is damaged."""
    return read_lines(path, ("task", "label", "score", "metrics", "failure", "state", "turns"))


def read_evaluation(path: Path) -> list[Record]:
    """The held-out episodes that were played to their end, one record each. Raises RunError where there is none."""
    episodes = read_episodes(path)
    played = [episode for episode in episodes if not episode["failure"] and episode["score"] is not None]
    if not played:
        raise RunError(f"{str(path)!r} holds no held-out episode that was played to its end; see `failure` in it.")
    return played


def read_lines(path: Path, required: Iterable[str]) -> list[Record]:
    """JSON objects, one a line; a last line that is still being written is left out. Raises RunError where one is damaged."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            for key in required:
                if key not in record:
                    raise ValueError(f"it lacks {key!r}")
                if not isinstance(record[key], KINDS.get(key, object)) or isinstance(record[key], bool):
                    raise ValueError(f"{key!r} is {record[key]!r:.40}")
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{str(path)!r}, line {number}, is damaged: {error}. Restore the file, or train the run anew."
            ) from error
        records.append(record)
    return records
