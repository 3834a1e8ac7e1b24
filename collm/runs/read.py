"""Reads files of a run. Every failure is a RunError that names the file, the reason and the way out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NotRequired

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from collm.errors import RunError
from collm.runs.directory import damage, read_file
from collm.types import Completion, Episode, Example, Turn, examples_of

Record = dict[str, Any]


class _Answers(TypedDict):
    agents: dict[str, dict[str, Any]]


class _Episode(TypedDict):
    """The keys of an episode's record that readers use."""

    task: int
    label: str
    score: float | None
    metrics: dict[str, float | None]
    failure: str
    state: str
    turns: list[_Answers]
    tokens: NotRequired[int]


METRICS: TypeAdapter[Any] = TypeAdapter(dict[str, float | None])
EPISODE: TypeAdapter[Any] = TypeAdapter(_Episode)

FORMER_METRICS = {"critic/imagined": "critic/replayed", "yardstick_turn_": "ceiling_turn_"}
"""Beginnings of metric names in runs of former versions -> how these names begin now."""


def present_name(metric: str) -> str:
    """The present name of a metric of an old run; any other name as it is.

    Example: present_name("yardstick_turn_3") == "ceiling_turn_3"
    """
    for former, present in FORMER_METRICS.items():
        if metric.startswith(former):
            return present + metric.removeprefix(former)
    return metric


def read_episodes(path: Path) -> list[Record]:
    """The recorded episodes, failed ones included. Raises RunError where the file is damaged."""
    return _read_lines(path, EPISODE)


def recorded_episode(record: Record, examples: Iterable[Example] = ()) -> Episode:
    """The episode of a record, to be replayed: texts, rewards and the environment's seed, without token ids and metrics.

    examples: worked examples that its agents read before their histories. Raises RunError where the record lacks a value.
    """
    try:
        turns = [
            Turn(
                {agent: said["read"] for agent, said in turn["agents"].items()},
                {
                    agent: Completion(agent, said["wrote"], finish_reason=said["finish"])
                    for agent, said in turn["agents"].items()
                },
                turn["reward"],
                turn["raw_reward"],
            )
            for turn in record["turns"]
        ]
        agents = tuple(dict.fromkeys(agent for turn in turns for agent in turn.completions))
        return Episode(
            record["task"],
            record["seed"],
            agents,
            turns=turns,
            terminated=record["terminated"],
            truncated=record["truncated"],
            failure=record["failure"],
            sibling=record["sibling"],
            path=tuple(record["path"]),
            label=record["label"],
            examples={agent: examples_of(examples, agent) for agent in agents},
        )
    except (KeyError, TypeError) as error:
        raise RunError(f"a recorded episode of task {record['label']!r} lacks {error}: train the run anew.") from error


def read_evaluation(path: Path) -> list[Record]:
    """The held-out episodes that were played to their end, one record each. Raises RunError where there is none."""
    if not (found := played(read_episodes(path))):
        raise RunError(f"{str(path)!r} holds no held-out episode that was played to its end; see `failure` in it.")
    return found


def played(episodes: Iterable[Record]) -> list[Record]:
    """The episodes that were played to their end."""
    return [episode for episode in episodes if not episode["failure"] and episode["score"] is not None]


def read_metrics(path: Path) -> list[Record]:
    """One record per iteration, under the present names of metrics. Raises RunError where the file is damaged."""
    records = _read_lines(path, METRICS, whole=("iteration", "joint_actions"))
    return [{present_name(name): value for name, value in record.items()} for record in records]


def _read_lines(path: Path, kind: TypeAdapter[Any], whole: Iterable[str] = ()) -> list[Record]:
    """JSON objects, one per line. An incomplete last line is left out. Raises RunError where a line is damaged.

    kind: the type of every object. whole: keys that must hold counts.
    """
    records = []
    for number, line in enumerate(read_file(path).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line, parse_constant=lambda _: None, parse_float=_finite, parse_int=_bounded)
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            kind.validate_python(record, strict=True)
            for key in whole:
                if key not in record:
                    raise ValueError(f"it lacks {key!r}")
                if not isinstance(record[key], int) or record[key] < 0:
                    raise ValueError(f"{key!r} is {record[key]!r:.40}")
        except (ValueError, RecursionError) as error:
            raise RunError(
                f"{str(path)!r}, line {number}, is damaged: {damage(error)}. Restore the file, or train the run anew."
            ) from error
        records.append(record)
    return records


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _bounded(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"the number {text[:20]}... is too large")
    return int(text)
