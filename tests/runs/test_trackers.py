"""Trackers get the numbers of metrics.jsonl, each step once, under one id; one that fails does not stop a run.

wandb, MLflow and Trackio are the extra `trackers`, which `make test-clients` installs; a test that needs them is skipped
elsewhere, naming the one that is missing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from collm.cli.main import main
from collm.errors import ConfigError, RunError
from collm.runs import trackers
from collm.runs.log import RunLog
from collm.runs.trackers import check_installed, run_id
from collm.settings.load import parse_config
from collm.training.trainer import Trainer

EVERY = ("tensorboard", "wandb", "mlflow", "trackio")
Steps = list[tuple[int, str, float]]
"""(step, name, value) of each number, in the order of the file."""


# --- the seam ------------------------------------------------------------------------------------------------------------


def test_one_that_is_not_installed_is_refused_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow").mkdir()  # a folder, such as data of an earlier run, is not the package
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    for name in ("wandb", "mlflow", "trackio"):
        with pytest.raises(
            ConfigError, match=rf"run\.trackers='{name}' needs the package {name}.*pip install 'collm\[trackers"
        ):
            check_installed([name])
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    run = {"folder": str(tmp_path / "runs"), "trackers": ["wandb"]}
    with pytest.raises(ConfigError, match="needs the package wandb"):
        Trainer(parse_config({"env": {"name": "agree"}, "run": run}))
    assert not (tmp_path / "runs").exists()


class Failing:
    """A tracker whose disk fails from step 2 on."""

    def __init__(self, folder: Path):
        self.steps: list[int] = []

    def log(self, step: int, numbers: dict[str, float]) -> None:
        if step >= 2:
            raise OSError("the disk\nfailed")
        self.steps.append(step)

    def flush(self) -> None: ...

    def close(self) -> None:
        raise AssertionError("it was left out")


class Missing(Failing):
    def __init__(self, folder: Path):
        raise ValueError("no such server")


def test_one_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "KINDS", {**trackers.KINDS, "failing": Failing, "missing": Missing})
    log = RunLog(tmp_path, trackers=["missing", "failing", "tensorboard", "tensorboard"])
    for step in range(4):
        log.metrics({"iteration": step, "joint_actions": step})
    log.flush()
    log.close()
    warnings = capfd.readouterr().err.splitlines()
    assert [line.split("the run goes on")[0] for line in warnings] == [
        f"collm: warning: the tracker {name!r} failed and is left out; " for name in ("missing", "failing")
    ]
    assert "the disk failed" in warnings[1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert tensorboard(tmp_path)[1] == [(step, "joint_actions", float(step)) for step in range(4)]


def test_the_id_of_a_run_is_kept(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first


@pytest.mark.parametrize("found", ["x/../../../victim", "*", "", "0123456\n", "0123456789"])
def test_an_id_that_another_wrote_is_refused(tmp_path: Path, found: str) -> None:
    (tmp_path / trackers.ID).write_text(found)
    with pytest.raises(RunError, match=r"tracker-id' holds .* not eight hexadecimal digits\. Remove it"):
        run_id(tmp_path)


def test_two_runs_may_make_the_experiment_at_once() -> None:
    answers = [None, SimpleNamespace(experiment_id="7")]

    def create(name: str) -> str:
        raise ValueError("it exists")

    asked = SimpleNamespace(get_experiment_by_name=lambda name: answers.pop(0), create_experiment=create)
    run = object.__new__(trackers.MLflow)
    run.client = asked
    assert run._experiment("collm") == "7"
    answers[:] = [None, None]
    with pytest.raises(ValueError, match="it exists"):
        run._experiment("collm")


def test_steps_that_mlflow_has_are_not_sent() -> None:
    sent: list[object] = []
    run = object.__new__(trackers.MLflow)
    run.id, run.metric, run.last = "1", (lambda *numbers: numbers), (lambda name: 3)
    run.client = SimpleNamespace(log_batch=lambda *batch, **metrics: sent.append(metrics["metrics"]))
    for step in (3, 4):
        run.log(step, {"reward": 1.0})
    assert [[metric[3] for metric in batch] for batch in sent] == [[4]]


# --- real trackers, offline ----------------------------------------------------------------------------------------------


def tensorboard(run: Path) -> tuple[list[str], Steps]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [""], [(e.step, name, e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]


def wandb(run: Path) -> tuple[list[str], Steps]:
    """From the transaction logs: blocks of 32 KiB of chunks, each with checksum, length and kind, after a head of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    ids, steps = [], []
    for path in run.glob("wandb/*/run-*.wandb"):
        data, at, record = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:  # the end of a block is padded
                at += 32768 - at % 32768
            length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
            record += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # whole, or the last chunk
                said, record = wandb_internal_pb2.Record.FromString(record), b""
                if said.WhichOneof("record_type") == "run":
                    ids.append(said.run.run_id)
                if said.WhichOneof("record_type") == "history":
                    items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in said.history.item}
                    steps += [(said.history.step.num, name, x) for name, x in items.items() if not name.startswith("_")]
    return ids, steps


def mlflow(run: Path) -> tuple[list[str], Steps]:
    with closing(sqlite3.connect(run / "mlflow.db")) as data:
        ids = [row[0] for row in data.execute("select value from tags where key = 'collm.run'")]
        return ids, data.execute("select step, key, value from metrics order by timestamp").fetchall()


def trackio(run: Path) -> tuple[list[str], Steps]:
    with closing(sqlite3.connect(run / "trackio" / "collm.db")) as data:
        rows = data.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
    assert len({identity for _, identity, _, _ in rows}) == 1
    ids = sorted({name.removeprefix(f"{run.name}-") for name, *_ in rows})
    return ids, [(step, name, value) for *_, step, numbers in rows for name, value in json.loads(numbers).items()]


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
RECIPE = """
[run]
iterations = 5
threads = 1
checkpoint_every = 2
trackers = ["tensorboard", "wandb", "mlflow", "trackio"]
[env]
name = "agree"
wording = "terse"
[rollout]
tasks = 2
max_tokens = 4
[critic]
body = "none"
"""
KILLED = """
import os, signal, sqlite3, sys, time
from contextlib import closing
from collm.cli.main import main
from collm.runs import checkpoint
from collm.runs.log import RunLog
checkpoint.Pace.due = False  # checkpoints after every second iteration alone
metrics = RunLog.metrics
def until(reached, log, seconds=60):
    end = time.monotonic() + seconds
    while not reached(log) and time.monotonic() < end:
        time.sleep(0.1)
def has_all(log):  # Trackio writes twice a second, in a thread
    try:
        with closing(sqlite3.connect(f"file:{log.folder / 'trackio' / 'collm.db'}?mode=ro", uri=True)) as data:
            return data.execute("select max(step) from metrics").fetchone() == (3,)
    except sqlite3.OperationalError:
        return False
def then_killed(log, record):
    metrics(log, record)
    if record["iteration"] == 3:
        until(has_all, log)
        os.kill(os.getpid(), signal.SIGKILL)
RunLog.metrics = then_killed
main(sys.argv[1:])
"""


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The first bytes of each connection to the proxy that is named for all addresses but this machine's."""
    server, found = socket.create_server(("127.0.0.1", 0)), []

    def listen() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                found.append(connection.recv(200))

    threading.Thread(target=listen, daemon=True).start()
    address = f"http://127.0.0.1:{server.getsockname()[1]}"
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, address)
        monkeypatch.setenv(name.lower(), address)
    for name in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # a key alone sends nothing
    yield found
    server.close()


@pytest.mark.slow
def test_all_have_the_numbers_of_metrics_once_after_a_kill(
    tmp_path: Path, requests: list[bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    for name in EVERY:
        if find_spec(name) is None:  # not imported here: Trackio would keep another folder than the run's
            pytest.skip(f"{name} is not installed here; `make test-clients` has it")
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    words = ["train", str(recipe), "--run.folder", str(tmp_path), "--run.name", "run", "--json"]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], timeout=1800, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    begun = (run / trackers.ID).read_text()
    held = {name: max(step for step, _, _ in READERS[name](run)[1]) for name in ("mlflow", "trackio")}
    assert held == {"mlflow": 3, "trackio": 3}  # so the iteration that is done again would appear twice

    assert main(["train", "--resume", str(run), "--json"]) == 0
    said = capfd.readouterr()
    assert "warning" not in said.err
    json.loads(said.out)  # nothing but the metrics of the last iteration
    assert (run / trackers.ID).read_text() == begun
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in records] == list(range(6))
    for name, reader in READERS.items():
        ids, steps = reader(run)
        assert set(ids) == {"" if name == "tensorboard" else begun}, name
        assert len({(step, key) for step, key, _ in steps}) == len(steps), f"{name} has a step twice"
        found: dict[int, dict[str, float]] = {}
        for step, key, value in steps:
            found.setdefault(step, {})[key] = value
        assert sorted(found) == list(range(6)), name
        for record in records:
            numbers = {
                key: pytest.approx(value, rel=1e-6)  # TensorBoard's are float32
                for key, value in record.items()
                if key != "iteration" and value is not None and not (record["iteration"] == 3 and key.startswith("seconds/"))
            }
            logged = found[record["iteration"]]
            assert {key: logged.get(key) for key in numbers} == numbers, (name, record["iteration"])
            assert logged.keys() == {key for key, value in record.items() if key != "iteration" and value is not None}
    assert not [path for path in run.rglob("*") if path.is_symlink()]
    assert requests == []
    assert os.environ.get("TRACKIO_DIR") is None
