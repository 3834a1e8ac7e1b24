"""The log of a run: metrics as JSON lines, which trackers also get, and full episodes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.runs.directory import episode_files
from collm.runs.files import explained, write_text
from collm.runs.read import read_metrics
from collm.runs.trackers import Trackers
from collm.types import Annotation, Completion, Episode, encodable

if TYPE_CHECKING:  # figures are drawn without torch
    from collm.learning.learner import Annotations

EMPTY: Mapping[Any, Any] = {}
NOTHING = Annotation()
EPISODES_SAVED = 4
"""Training episodes written to the run directory per iteration."""


def episode_record(episode: Episode, annotations: Mapping[tuple[int, str], Annotation] = EMPTY) -> dict[str, Any]:
    """An episode as plain values: every text, the reward by part, values, TD errors, tokens and seconds.

    Every key has one type in every file and no value is null, so that readers that infer types (pyarrow, `datasets`) can read
    the files of several runs of a task together. `learned` lists which of `value`, `td_error` and `advantage` exist, separated
    by spaces; the others are 0. For an agent that sent no message, `message` has an empty text and an empty `finish`. The score
    of an episode without a turn is 0; `failure` has the reason.

    Args: annotations: (turn, agent) -> the learner's annotation of that answer.
    """
    return {
        "task": episode.task,
        "label": episode.label,
        "seed": episode.seed,
        "sibling": episode.sibling,
        "path": list(episode.path),
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "failure": episode.failure,
        "score": float(episode.score) if episode.turns else 0.0,
        "metrics": _floats(episode.metrics),
        "tokens": episode.num_tokens(),
        "seconds": round(episode.seconds, 4),
        "state": episode.state,
        "turns": [
            {
                "reward": float(turn.reward),
                "raw_reward": float(turn.raw_reward),
                "parts": _floats(turn.parts),
                "state": turn.state,
                "agents": {
                    agent: {
                        "read": turn.observations[agent],
                        "message": _written(turn.messages[agent]) if agent in turn.messages else NO_MESSAGE,
                        **_written(answer),
                        **_learned(annotations.get((t, agent), NOTHING)),
                    }
                    for agent, answer in turn.completions.items()
                },
            }
            for t, turn in enumerate(episode.turns)
        ],
    }


def _written(completion: Completion) -> dict[str, Any]:
    """A text as plain values, with its number of tokens; `thinking` has thoughts and text, where thoughts were kept apart."""
    num_tokens = 0 if completion.token_ids is None else len(completion.token_ids)
    finish, whole = completion.finish_reason, completion.written or ""
    return {"wrote": completion.text, "finish": finish, "tokens": num_tokens, "thinking": whole}


NO_MESSAGE = {"wrote": "", "finish": "", "tokens": 0, "thinking": ""}


def _learned(said: Annotation) -> dict[str, Any]:
    """The learner's numbers for an answer; `learned` lists which of them exist."""
    found = {"value": said.value, "td_error": said.td_error, "advantage": said.advantage}
    numbers = {name: float(number or 0.0) for name, number in found.items()}
    return numbers | {"learned": " ".join(name for name, number in found.items() if number is not None)}


def _floats(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Whole numbers as floats; other values are unchanged."""
    return {name: float(value) if isinstance(value, int) else value for name, value in numbers.items()}


def describe(episodes: list[Episode]) -> dict[str, Any]:
    """Means over an iteration's episodes; failed episodes are counted and left out of the means."""
    played = [episode for episode in episodes if not episode.failure and episode.turns]
    record: dict[str, Any] = {
        "episodes": len(episodes),
        "episodes_failed": len(episodes) - len(played),
        "tokens/sampled": sum(episode.num_tokens() for episode in played),
        "tokens/prompt": sum(
            len(c.prompt_ids)
            for e in played
            for turn in e.turns[e.own_from :]
            for c in turn.completions.values()
            if c.prompt_ids is not None
        ),
    }
    if played:
        record["reward/raw"] = math.fsum(episode.score for episode in played) / len(played)
        record["reward/return"] = math.fsum(turn.reward for e in played for turn in e.turns) / len(played)
        record["turns"] = sum(len(episode.turns) for episode in played) / len(played)
        answers = [c for e in played for turn in e.turns[e.own_from :] for c in turn.completions.values()]
        record["answers_cut_off"] = sum(c.finish_reason == "length" for c in answers) / len(answers)
        for name in played[0].metrics:
            record[f"task/{name}"] = math.fsum(e.metrics.get(name, 0.0) for e in played) / len(played)
    return record


class RunLog:
    """Writes the logs of a run directory.

    On resume, records of iterations after `resumed_at` are dropped, since they will be written again. If that iteration is
    `pending`, its line and its evaluation are dropped too, but not the episodes that it was trained on. `before` holds the
    records that were kept.
    """

    def __init__(self, folder: Path, *, trackers: Iterable[str] = (), resumed_at: int = -1, pending: bool = False):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        completed = resumed_at - pending
        begun = os.path.lexists(self.path)
        kept = [record for record in read_metrics(self.path) if record["iteration"] <= completed] if begun else []
        self.before = kept
        write_text(self.path, "".join(_line(record) for record in kept))
        with explained(folder / "episodes"):
            (folder / "episodes").mkdir(exist_ok=True)
            for evaluation, last in ((True, completed), (False, resumed_at)):
                for iteration, path in episode_files(folder, evaluation=evaluation).items():
                    if iteration > last:
                        path.unlink()
            self.file = self.path.open("a", encoding="utf-8")
        self.trackers = Trackers(trackers, folder, kept)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one iteration's line."""
        with explained(self.path):
            self.file.write(encodable(_line(record)))
            self.file.flush()
        self.trackers.log(record)

    def episodes(
        self, iteration: int, episodes: Iterable[Episode], annotations: Annotations = EMPTY, *, suffix: str = ""
    ) -> None:
        """Write the full episodes of one iteration to their own file, with the learner's annotations."""
        path = self.folder / "episodes" / f"{iteration:06d}{suffix}.jsonl"
        lines = "".join(_line(episode_record(e, annotations.get(number, EMPTY))) for number, e in enumerate(episodes))
        if lines:
            write_text(path, lines)

    def flush(self) -> None:
        """Flush all lines to the disk."""
        with explained(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())
        self.trackers.flush()

    def close(self) -> None:
        """Close the files. Errors are ignored, so that on a full disk the first error is the one reported."""
        with contextlib.suppress(OSError):
            self.file.close()
        self.trackers.close()


def _line(record: Mapping[str, Any]) -> str:
    """One JSON line; NaN and infinite numbers (explained variance without variance, say) become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, ensure_ascii=False) + "\n"
