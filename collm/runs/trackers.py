"""Trackers of a run (`run.trackers`): programs that get the numbers of metrics.jsonl, one class each, imported when named.

At every start a tracker is given the records that metrics.jsonl has kept, then each new one. TensorBoard and an offline wandb
run are written anew; the others keep what they have and take later steps only. In both cases a resumed run keeps its id, and no
step appears twice. Nothing leaves this machine unless the tracker's own environment variable asks for it: WANDB_MODE=online,
MLFLOW_TRACKING_URI, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL.
"""

from __future__ import annotations

import math
import os
import re
import secrets
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from collm.errors import ConfigError, RunError
from collm.runs.directory import read_file, read_settings
from collm.runs.files import remove, write_text
from collm.runs.output import complain

PROJECT = "collm"
"""Name of the project or experiment, where the environment variable of wandb or MLflow does not name another."""
ID = "tracker-id"
"""File of the run directory: the run's id in trackers other than TensorBoard."""


class Tracker(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record finite numbers; steps increase, and begin anew at each start of the run."""

    def flush(self) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files of plain scalars in RUN/tensorboard, which all readers support."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        for old in events.glob("*") if events.exists() else ():
            remove(old)
        self.writer = SummaryWriter(str(events))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """An offline run in RUN/wandb, which `wandb sync` uploads; WANDB_MODE=online sends it while it is written."""

    def __init__(self, folder: Path):
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        name = run_id(folder)
        for old in (folder / "wandb").glob(f"offline-run-*-{name}"):
            remove(old)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=folder.resolve().name,
            id=name,
            resume=None if mode == "offline" else "allow",
            mode=mode,
            dir=folder,
            config=read_settings(folder),
            settings=wandb.Settings(console="off", quiet=True, symlink=False),
        )
        for link in (folder / "wandb").glob("*/logs/debug-core.log"):  # a run directory holds no links
            if link.is_symlink():
                remove(link)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self.run.starting_step:
            self.run.log(dict(numbers), step=step, commit=True)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """A run in the database RUN/mlflow.db, or on the server of MLFLOW_TRACKING_URI; a tag holds the id."""

    def __init__(self, folder: Path):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.metric = Metric
        local = f"sqlite:///{folder.absolute() / 'mlflow.db'}"
        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        place = self._experiment(experiment)
        tag, value = "collm.run", run_id(folder)
        begun = self.client.search_runs([place], f"tags.`{tag}` = '{value}'")
        if begun:
            self.id = begun[0].info.run_id
            self.client.update_run(self.id, "RUNNING")
        else:
            self.id = self.client.create_run(place, run_name=folder.resolve().name, tags={tag: value}).info.run_id
            settings = {f"{room}.{key}": v for room, table in read_settings(folder).items() for key, v in table.items()}
            self.client.log_batch(self.id, params=[Param(key, str(v)[:500]) for key, v in settings.items()])
        self.last = cache(self._last) if begun else lambda name: -1

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which is made if there is none. Another run may make it at the same time."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name))
            except Exception:
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _last(self, name: str) -> int:
        """The last step of a metric that the run has."""
        return max((metric.step for metric in self.client.get_metric_history(self.id, name)), default=-1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        allowed = {re.sub(r"[^\w\-./ :]", "_", name): value for name, value in numbers.items()}
        new = [self.metric(name, value, now, step) for name, value in allowed.items() if step > self.last(name)]
        if new:
            self.client.log_batch(self.id, metrics=new)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackio:
    """A run in RUN/trackio or TRACKIO_DIR, or in the space of TRACKIO_SPACE_ID; its name ends with the id.

    A process has one such folder, which Trackio reads when it is imported: later runs of the process go to the first's.
    """

    def __init__(self, folder: Path):
        before = os.environ.get("TRACKIO_DIR")
        os.environ["TRACKIO_DIR"] = before or str(folder.absolute() / "trackio")
        try:
            import trackio
        finally:
            if before is None:
                del os.environ["TRACKIO_DIR"]
        with redirect_stdout(sys.stderr):  # standard output belongs to the command
            name = f"{folder.resolve().name}-{run_id(folder)}"
            self.api, self.run = trackio, trackio.init(PROJECT, name, config=read_settings(folder), resume="allow", embed=False)
        self.first = self.run._next_step

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        if step >= self.first:
            self.run.log(dict(numbers), step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        with redirect_stdout(sys.stderr):
            self.api.finish()


KINDS: dict[str, type[Any]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}
"""Values of `run.trackers`, which are also the names of the packages."""


def check_installed(names: Iterable[str]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name is not the package
            raise ConfigError(
                f"run.trackers={name!r} needs the package {name}, which is not installed: pip install 'collm[trackers]', or "
                "leave it out (--run.trackers '[]' is none)."
            )


def run_id(folder: Path) -> str:
    """The run's id, which is made at its first use and kept in the run directory. Raises RunError for a file that holds none.

    The id is part of names of folders that are removed.
    """
    if not os.path.lexists(folder / ID):
        write_text(folder / ID, secrets.token_hex(4))
    found = read_file(folder / ID).decode(errors="replace")
    if not re.fullmatch("[0-9a-f]{8}", found):
        raise RunError(f"{str(folder / ID)!r} holds {found[:40]!r}, not eight hexadecimal digits. Remove it to get a new id.")
    return found


class Trackers:
    """The open trackers of a run. One that fails is left out from then on, with one warning; the run goes on.

    kept: the records of metrics.jsonl so far.
    """

    def __init__(self, names: Iterable[str], folder: Path, kept: Iterable[Mapping[str, Any]] = ()):
        self._open: dict[str, Tracker] = {}
        for name in dict.fromkeys(names):
            with self._warning(name):
                self._open[name] = KINDS[name](folder)
        for record in kept:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass on the finite numbers of one record of metrics.jsonl."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if isinstance(value, (int, float)) and name != "iteration" and math.isfinite(value)
        }
        for name, tracker in list(self._open.items()):
            with self._warning(name):
                tracker.log(record["iteration"], numbers)

    def flush(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warning(name):
                tracker.flush()

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            with self._warning(name):
                tracker.close()

    @contextmanager
    def _warning(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            complain(f"collm: warning: the tracker {name!r} failed and is left out; the run goes on without it: {reason}")
