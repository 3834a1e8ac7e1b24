"""A run that is stopped anywhere, by a signal or by kill -9 inside a save, repeats the uninterrupted one bit for bit."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import random
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from collm.engines import local
from collm.errors import ConfigError, RunError
from collm.learning import parts, steps
from collm.runs import checkpoint, directory
from collm.settings.load import load_config, parse_config
from collm.training import trainer as trainer_module
from collm.training.signals import Interrupted
from collm.training.trainer import Trainer

RECIPE = """
[run]
iterations = {iterations}
threads = 1
checkpoint_every = 2
[env]
name = "agree"
wording = "terse"
turns = 2
[rollout]
tasks = 8
max_tokens = 4
[algorithm]
name = "collm-cc"
lam = 0.5
teammates = "replay"
[critic]
body = "auto"
lr = 1e-3
normalize_targets = true
metrics = true
[learner]
lr = 1e-3
schedule = "cosine"
[evaluation]
every = 3
temperature = 1.0
"""


KILLS = int(os.environ.get("COLLM_KILLS", "8"))


def collm(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "collm.cli.main", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def start(folder: Path, name: str, iterations: int) -> list[str]:
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(iterations=iterations))
    return ["train", str(recipe), "--run.folder", str(folder), "--run.name", name]


def outcome(run: Path) -> tuple[dict[str, bytes], list[dict], dict[str, object], dict[str, object]]:
    """Final weights, metrics without seconds, episode files without seconds, and the last checkpoint's account."""
    weights = {
        f"{path.parent.name}.{name}": tensor.tobytes()
        for path in sorted((run / "checkpoints").glob("*/*.safetensors"))
        if path.parent == max((run / "checkpoints").glob("[0-9]*"))
        for name, tensor in ((f"{path.name}/{k}", v) for k, v in load_file(path).items())
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]
    episodes = {
        path.name: [{**json.loads(line), "seconds": 0} for line in path.read_text().splitlines()]
        for path in sorted((run / "episodes").iterdir())
    }
    state = json.loads((max((run / "checkpoints").glob("[0-9]*")) / "state.json").read_text())
    return weights, metrics, episodes, state


def finish(run: Path) -> None:
    process = collm("train", "--resume", str(run))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of six iterations."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    process = collm(*start(folder, "whole", 6))
    assert process.wait(timeout=300) == 0
    return folder / "whole"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, whole: Path, signum: int, code: int
) -> None:
    part = collm(*start(tmp_path, "part", 6))
    metrics = tmp_path / "part" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert part.poll() is None, part.stderr.read()
        time.sleep(0.02)
    part.send_signal(signum)
    _, err = part.communicate(timeout=300)
    assert part.returncode == code
    assert "--resume" in err
    assert "Traceback" not in err
    finish(tmp_path / "part")
    assert outcome(tmp_path / "part") == outcome(whole)


@pytest.mark.parametrize("at", [0, 3, 6])
def test_stopped_in_an_evaluation_it_is_evaluated_once_more(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The first, one in the middle, and the last; the episodes trained on stay, and the best is known in the end."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(iterations=6))
    part = Trainer(load_config(recipe, overrides={"run.folder": str(tmp_path), "run.name": "part"}), quiet=True)
    real = trainer_module.evaluate

    def interrupted(config: Any, collector: Any, **rest: Any) -> Any:
        if part.iteration == at:
            part.signals.received = signal.SIGTERM
        return real(config, collector, **rest)

    monkeypatch.setattr(trainer_module, "evaluate", interrupted)
    with pytest.raises(Interrupted):
        part.run()
    monkeypatch.undo()
    Trainer.resume(part.folder, quiet=True).run()
    assert outcome(part.folder) == outcome(whole)


@pytest.mark.parametrize("saved", [0, 2])
def test_a_signal_inside_an_update_leaves_it_and_the_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    """The signal comes after the first optimizer step of an iteration: no further micro-batch is read, nothing is saved."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(iterations=6))
    part = Trainer(load_config(recipe, overrides={"run.folder": str(tmp_path), "run.name": "part"}), quiet=True)
    read: list[bool] = []
    first_step, micro_batches = steps.step, parts.micro_batches

    def stepping(*arguments: Any) -> float:
        norm = first_step(*arguments)
        if part.iteration == saved and not read:
            read.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    def reading(*arguments: Any, **rest: Any) -> Any:
        for micro in micro_batches(*arguments, **rest):
            assert not read, "a micro-batch was read after the signal"
            yield micro

    monkeypatch.setattr(parts, "step", stepping)
    monkeypatch.setattr(parts, "micro_batches", reading)
    with pytest.raises(Interrupted):
        part.run()
    monkeypatch.undo()
    assert not part.whole
    assert [int(path.name) for path in directory.checkpoints(part.folder)] == ([saved] if saved else [])
    Trainer.resume(part.folder, quiet=True).run()
    assert outcome(part.folder) == outcome(whole)


def test_a_signal_inside_a_generation_leaves_it_and_everything_before_is_saved(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(iterations=6))
    part = Trainer(load_config(recipe, overrides={"run.folder": str(tmp_path), "run.name": "part"}))
    decode = local.decode

    def decoding(*arguments: Any) -> Any:
        if part.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            raise AssertionError("the generation went on")
        return decode(*arguments)

    monkeypatch.setattr(local, "decode", decoding)
    with pytest.raises(Interrupted):
        part.run()
    monkeypatch.undo()
    line = next(line for line in capfd.readouterr().err.splitlines() if "SIGINT" in line)
    assert line == f"collm: SIGINT: stopping after this micro-batch; `collm train --resume {part.folder}` goes on."
    assert [int(path.name) for path in directory.checkpoints(part.folder)] == [1]
    Trainer.resume(part.folder, quiet=True).run()
    assert outcome(part.folder) == outcome(whole)


def test_checkpoints_are_written_where_they_cost_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A save of 2 s: due again after 100 s; one of 0.1 s: after a minute."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for seconds, wait in ((2.0, 100.0), (0.1, 60.0)):
        pace = checkpoint.Pace()
        with pace.measure():
            now[0] += seconds
        now[0] += wait - 0.5
        assert not pace.due
        now[0] += 1.0
        assert pace.due


@pytest.mark.slow
@pytest.mark.parametrize("hangs_up", [True, False])
def test_a_run_outlives_its_terminal(tmp_path: Path, hangs_up: bool) -> None:
    """A closed terminal sends SIGHUP, which saves; a run that it was not sent to trains on, whether or not anybody reads."""
    ours, theirs = pty.openpty()

    def own_session() -> None:
        os.setsid()
        if hangs_up:
            fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "collm.cli.main", *start(tmp_path, "run", 12)],
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        preexec_fn=own_session,
        pass_fds=(theirs,),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    run = tmp_path / "run"
    while num_lines(run) < 3:
        assert process.poll() is None
        with suppress(BlockingIOError):
            os.read(ours, 1 << 16)
        time.sleep(0.01)
    os.close(ours)
    assert process.wait(timeout=300) == (128 + signal.SIGHUP if hangs_up else 0)
    assert (run / "final").is_dir() != hangs_up
    if hangs_up:
        finish(run)
    assert num_lines(run) == 13


def test_settings_that_a_run_is_resumed_with_are_kept_only_where_they_fit(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(iterations=2))
    folder = Trainer(load_config(recipe, overrides={"run.folder": str(tmp_path), "run.name": "run"}), quiet=True).run()
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"run\.iterations=1, but 2 iterations are done"):
        Trainer.resume(folder, overrides={"run.iterations": 1}, quiet=True).run()
    with directory.lock(folder), pytest.raises(RunError, match="being trained by another process"):
        Trainer.resume(folder, overrides={"run.iterations": 3}, quiet=True).run()
    with pytest.raises(ConfigError, match=r"'learner\.lr' cannot change when a run is resumed: these can: run\.iterations"):
        Trainer.resume(folder, overrides={"learner.lr": 1.0}, quiet=True)
    assert (folder / "config.json").read_bytes() == before
    Trainer.resume(folder, overrides={"run.iterations": 3}, quiet=True).run()
    assert num_lines(folder) == 4
    assert directory.read_config(folder).run.iterations == 3


def test_what_is_wrong_with_the_held_out_tasks_is_said_before_the_run_begins(tmp_path: Path) -> None:
    values = {
        "env": {"name": "str_build", "wording": "terse", "strings": ["IT"]},
        "evaluation": {"every": 1},
        "run": {"folder": str(tmp_path), "name": "run"},
    }
    with pytest.raises(ConfigError, match="no word is held out"):
        Trainer(parse_config(values), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_anywhere_and_inside_saves_the_run_ends_equal(tmp_path: Path) -> None:
    """`COLLM_KILLS=20 pytest -m slow tests/training/test_resume.py` kills twenty times, at least five of them inside a save."""
    iterations, few = 4 * KILLS, ("--rollout.tasks", "2")
    whole = collm(*start(tmp_path, "whole", iterations), *few)
    assert whole.wait(timeout=600) == 0
    run = tmp_path / "part"
    rng = random.Random(0)
    process = collm(*start(tmp_path, "part", iterations), *few)
    inside = 0
    for kills in range(KILLS):
        lines = num_lines(run)
        if kills % 3 == 0:  # inside a save, as soon as one begins
            wait(process, lambda: any((run / "checkpoints").glob(".saving-*/*")), pause=0.0)
        else:  # anywhere after some new iteration
            wait(process, lambda known=lines: num_lines(run) > known, pause=0.005)
            time.sleep(rng.uniform(0, 0.25))
        assert process.poll() is None, "the run ended before it could be killed often enough"
        process.kill()
        process.wait()
        inside += any((run / "checkpoints").glob(".saving-*"))
        process = collm("train", "--resume", str(run))
    assert process.wait(timeout=600) == 0
    assert inside >= KILLS // 4, f"only {inside} kills inside a save"
    assert outcome(run) == outcome(tmp_path / "whole")
    assert not list((run / "checkpoints").glob(".*"))


def num_lines(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait(process: subprocess.Popen[str], ready: Callable[[], bool], pause: float) -> None:
    deadline = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(pause)
