"""Runs killed at every kind of file event, and at any time, go on as if nothing had been.

A child forked from this process trains; an audit hook in it counts what it does to files below its run directory, and sends
SIGKILL to itself at a chosen event. COLLM_CAMPAIGN=50 kills each variant so often (default 5).
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import pytest
from test_resume import outcome

from collm.cli.main import main

CAMPAIGN = int(os.environ.get("COLLM_CAMPAIGN", "5"))
RECIPE = """
[run]
iterations = 4
threads = 1
checkpoint_every = 2
trackers = {trackers}
[env]
name = "agree"
wording = "terse"
[rollout]
tasks = 4
max_tokens = 4
[algorithm]
name = "collm-cc"
[critic]
lr = 1e-3
body = "auto"
[learner]
lr = 1e-3
[evaluation]
every = {every}
episodes = 4
temperature = 1.0
[team]
lora = {lora}
"""
VARIANTS = {
    "plain": {"trackers": "[]", "every": 0, "lora": '"none"'},
    "LoRA": {"trackers": "[]", "every": 0, "lora": "{ rank = 2 }"},
    "evaluation": {"trackers": "[]", "every": 1, "lora": '"none"'},
    "TensorBoard": {"trackers": '["tensorboard"]', "every": 0, "lora": '"none"'},
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def watch(folder: Path, act: Callable[[str], None]) -> None:
    """Call `act(path)` before everything that this process does to a file below `folder`."""
    root = str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        path = arguments[0]
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(root):
            act(os.fsdecode(path))

    sys.addaudithook(hook)


def forked(words: list[str], hook: Callable[[], None] = lambda: None, kill_after: float | None = None) -> int:
    """The wait status of `collm WORDS` in a forked child; killed after so many seconds if it still runs."""
    child = os.fork()
    if child == 0:
        code = 99
        try:
            hook()
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
                code = main(words)
            if code:
                os.write(2, said.getvalue().encode())
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    end = time.monotonic() + (600 if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            return os.waitpid(child, 0)[1]
        time.sleep(0.005)


def leftovers(run: Path) -> list[Path]:
    """What a writer that was killed, or failed, left in a run directory."""
    return [path for path in run.rglob("*") if path.name.startswith((".saving-", ".removing-"))]


def kind_of(path: str, run: Path) -> str:
    """The folder of the run in which something happened."""
    inside = Path(path).relative_to(run).parts
    return inside[0] if len(inside) > 1 else "run"


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_run_killed_at_any_event_goes_on(tmp_path: Path, variant: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(**VARIANTS[variant]))
    start = ["train", str(recipe), "--run.folder", str(tmp_path), "--run.name"]
    events = tmp_path / "events"
    whole = tmp_path / "whole"

    def count() -> None:
        handle = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        watch(whole, lambda path: os.write(handle, f"{path}\n".encode()) and None)

    began = time.monotonic()
    assert forked([*start, "whole"], count) == 0
    seconds = time.monotonic() - began
    paths = events.read_text().splitlines()
    expected = outcome(whole)
    rng = random.Random(variant)
    timed = CAMPAIGN * 2 // 5
    chosen = [round((i + rng.random()) * len(paths) / (CAMPAIGN - timed)) for i in range(CAMPAIGN - timed)]
    killed: Counter[str] = Counter()
    for number in range(CAMPAIGN):
        run = tmp_path / f"part{number}"

        def strike(at: int = chosen[number] if number < len(chosen) else -1, run: Path = run) -> None:
            left = [at]

            def act(path: str) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            watch(run, act)

        late = None if number < len(chosen) else rng.uniform(0.05, 0.7 * seconds)
        status = forked([*start, run.name], strike, late)
        if os.WIFSIGNALED(status):
            at = min(max(chosen[number], 1), len(paths)) - 1 if number < len(chosen) else -1
            killed[kind_of(paths[at], whole) if at >= 0 else "any time"] += 1
        begun = (run / "config.json").is_file()
        words = ["train", "--resume", str(run)] if begun else [*start, run.name]
        assert forked(words) == 0, f"kill {number} at event {chosen[number] if number < len(chosen) else late}"
        assert outcome(run) == expected
        assert not leftovers(run)
        with suppress(OSError):
            for path in sorted(run.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
    print(f"{variant}: {sum(killed.values())} of {CAMPAIGN} killed over {len(paths)} events: {dict(killed)}")
    assert sum(killed.values()) >= CAMPAIGN * 3 // 5
