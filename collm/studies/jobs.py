"""Runs of a study as processes: finished runs are not repeated, and interrupted runs resume exactly.

Every run is a separate process (training/cell.py), which ends with the process that started it.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from collm.errors import RunError
from collm.runs.directory import ignored, read_file
from collm.runs.files import write_text
from collm.runs.processes import Running, begin_module
from collm.settings import former
from collm.settings.rooms import Config
from collm.studies.result import RESULTS, Cell, read_result
from collm.studies.series import REWARD


@dataclass(frozen=True, slots=True)
class StudyJob:
    """One cell with the settings of its run."""

    cell: Cell
    config: Config
    """All settings of the run."""
    trained: bool
    """True for a run that trains; False if the untrained team is evaluated once."""
    judged: int = 0
    """Number of answers whose credit is judged at half of the training."""

    @property
    def settings(self) -> Path:
        """The file of the cell's settings, beside its run directory."""
        return Path(f"{self.cell.folder}.json")

    @property
    def log(self) -> Path:
        """The file of the output of the run's processes."""
        return Path(f"{self.cell.folder}.log")

    def check_unchanged(self) -> None:
        """Raise RunError where the cell was begun with other settings, so that results of two recipes are never mixed."""
        if not os.path.lexists(self.settings):
            return
        try:
            found = digest(json.loads(read_file(self.settings)), self.trained)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(
                f"{str(self.settings)!r} cannot be read: {error!r}. Remove it and {str(self.cell.folder)!r} to run it anew."
            ) from error
        if found != self.cell.settings:
            raise RunError(
                f"{self.cell.folder} was begun with other settings than the recipe now has. Choose another --folder, or remove "
                f"it, {self.settings.name} and {RESULTS} to run it anew."
            )


def digest(settings: Mapping[str, Any], trained: bool) -> str:
    """A hash of all settings that affect results.

    Left out are the run's folder, the cluster, the settings of learning in runs that do not train, and settings that were added
    later, if they have the value that keeps the earlier behaviour. Of the trackers TensorBoard alone counts, as it always did.
    `critic.metrics` counts with its former value where it means the same.
    """
    counted = {room: dict(values) for room, values in former.translate(settings).items()}
    counted["run"]["folder"] = None
    counted["run"]["tensorboard"] = "tensorboard" in counted["run"].pop("trackers")
    counted.pop("cluster", None)
    critic, built_in = counted["critic"], ":" not in str(counted["env"]["name"])
    read = former.metrics(critic.get("metrics"))
    if read == "auto" and critic["reads"] == "joint" and built_in:  # every built-in environment reports metrics
        read = "global"
    critic["metrics"] = {"global": True, "none": False}.get(read, read)
    for (room, key), before in former.ADDED.items():
        if counted[room].get(key) == before:
            del counted[room][key]
    if not trained:
        counted = {room: values for room, values in counted.items() if room not in ("algorithm", "critic", "learner")}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:16]


SEEN = 60.0
"""Seconds after which a network file system shows what another machine wrote."""

Begin = Callable[[Sequence[str], Path, Path], Running]
"""Begins `python -m WORDS`, which works in a run directory, with a file for its output: (WORDS, directory, file)."""


def begin_here(words: Sequence[str], run: Path, log: Path) -> Running:
    """Begin it on this machine."""
    return begin_module(words, log)


def run_jobs(
    jobs: Sequence[StudyJob],
    workers: int,
    *,
    begin: Begin = begin_here,
    patience: float = 0,
    after_each: Callable[[], Any],
    say: Callable[[str], None] = lambda text: None,
) -> list[StudyJob]:
    """Run the jobs, `workers` at a time, and return those that failed.

    patience: seconds until the folder `final` of a run that has ended with exit code 0 is seen here. after_each: called after
    the end of each run. say: called with each line of progress. Raises RunError after a signal.
    """
    started, done, ended = time.monotonic(), 0, dict[Running, float]()
    failed: list[StudyJob] = []
    running: dict[Running, StudyJob] = {}
    queue = list(jobs)
    with _stoppable(running):
        while queue or running:
            while queue and len(running) < workers:
                job = queue.pop(0)
                running[begin(_words(job), job.cell.folder, job.log)] = job
            time.sleep(0.05)
            for process in [p for p in running if p.poll() is not None]:
                ended.setdefault(process, time.monotonic())
                if not process.poll() and not running[process].cell.finished and time.monotonic() - ended[process] < patience:
                    continue
                job = running.pop(process)
                done += 1
                if process.poll() or not job.cell.finished:
                    failed.append(job)
                    say(f"failed: {job.cell.folder}; see {job.log}")
                left = (time.monotonic() - started) / done * (len(jobs) - done) / 60
                numbers = "" if job in failed else f"  reward {read_result(job.cell).final[REWARD]:.3f}"
                say(f"{done}/{len(jobs)}  {job.cell.task} {job.cell.folder.name}{numbers}  {left:.1f} min left")
                after_each()
    return failed


def _words(job: StudyJob) -> tuple[str, ...]:
    """The module of one cell's process with its arguments, once its settings are written."""
    write_text(job.settings, json.dumps(job.config.resolved(), indent=1))
    kind = "train" if job.trained else "evaluate"
    return "collm.training.cell", kind, str(job.settings), str(job.cell.folder), str(job.judged)


@contextmanager
def _stoppable(running: Mapping[Running, StudyJob]) -> Iterator[None]:
    """Pass Ctrl-C, SIGTERM and SIGHUP on to the runs, which save; then raise RunError."""

    def stop(signum: int, frame: FrameType | None) -> None:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        raise RunError(f"stopped by {signal.Signals(signum).name}; the running runs are saved. Start again to continue.")

    try:
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not ignored(s)}
    except ValueError:  # not in the main thread: the caller handles signals
        before = {}
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)
