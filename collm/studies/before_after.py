"""A run's held-out results before and after training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from collm.errors import RunError
from collm.runs.alarms import recorded
from collm.runs.directory import command
from collm.runs.open import Run
from collm.runs.read import Record, read_evaluation
from collm.studies.intervals import Interval, explain, interval
from collm.studies.series import REWARD, scores


@dataclass(frozen=True, slots=True)
class Row:
    """One measure before and after training, and the mean difference per task (after minus before)."""

    before: Interval
    after: Interval
    difference: Interval

    @property
    def apart(self) -> bool:
        """Whether the intervals before and after do not overlap."""
        return self.before.apart(self.after)


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """A run's first and last held-out evaluation, over the tasks that were played to their end in both."""

    run: Run
    first: int
    """Iterations done at the first evaluation."""
    last: int
    """Iterations done at the last evaluation."""
    num_tasks: int
    """Number of distinct tasks that were played to their end in both evaluations."""
    rows: dict[str, Row]
    """Measure -> its row; "reward" first."""
    before: list[Record]
    """Episodes of the first evaluation."""
    after: list[Record]
    """Episodes of the last evaluation."""
    notes: list[str]
    """Notes on the numbers, for readers."""
    cost: dict[str, Any]
    """The cost of training: joint actions, seconds, tokens."""

    @property
    def labels(self) -> tuple[str, str]:
        """Names of the two evaluations."""
        of = "" if self.last == self.run.planned else f" of {self.run.planned}"
        return "before training" if self.first == 0 else f"after {self.first}", f"after {self.last}{of} iterations"

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        config = self.run.config
        rows = {
            name: {
                "before": row.before.plain(),
                "after": row.after.plain(),
                "difference": row.difference.plain(),
                "apart": row.apart,
            }
            for name, row in self.rows.items()
        }
        return {
            "run": str(self.run.folder),
            "env": config["env"]["name"],
            "algorithm": config["algorithm"]["name"],
            "seed": config["run"].get("seed"),
            "iterations": {"before": self.first, "after": self.last, "planned": self.run.planned},
            "tasks": self.num_tasks,
            "reward": rows.pop(REWARD),
            "metrics": rows,
            "notes": self.notes,
            **self.cost,
        }


def before_after(run: Run) -> BeforeAfter:
    """Compare a run's last held-out evaluation with its first. Raises RunError with fewer than two evaluations."""
    evaluations = run.evaluations()
    if len(evaluations) < 2:
        have = f"only one, after {next(iter(evaluations))} iterations" if evaluations else "none"
        resume = command("collm", "train", "--resume", run.folder)
        raise RunError(
            f"run {str(run.folder)!r} needs two held-out evaluations to compare and has {have}. Let it train on "
            f"({resume}); a run with evaluation.every=0 makes none: see `collm evaluate`."
        )
    first, last = min(evaluations), max(evaluations)
    before, after = read_evaluation(evaluations[first]), read_evaluation(evaluations[last])
    old, new = scores(before), scores(after)
    tasks = [task for task in new[REWARD] if task in old[REWARD]]
    if not tasks:
        raise RunError(f"the first and the last held-out evaluation of run {str(run.folder)!r} have no task in common.")
    rows = {
        name: Row(
            interval([old[name][task] for task in tasks]),
            interval([new[name][task] for task in tasks]),
            interval([new[name][task] - old[name][task] for task in tasks]),
        )
        for name in new
        if name in old
    }
    notes = explain({name: row.difference for name, row in rows.items()})
    left_out = len(old[REWARD].keys() | new[REWARD].keys()) - len(tasks)
    if left_out:
        notes.append(f"left out: {left_out} tasks that were not played to their end both times")
    notes += recorded(run.metrics)
    return BeforeAfter(run, first, last, len(tasks), rows, before, after, notes, run.cost())
