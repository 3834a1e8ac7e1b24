"""A study over two nodes of a cluster: the same results as processes of this machine, also after the loss of a node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import below, kill_all, running, until
from ray_nodes import OWN, node
from servers import free_port

pytest.importorskip("ray", reason="ray is not installed, so nothing was tried on it: pip install 'collm[cluster]'")

RECIPE = """
[compare]
methods = ["magrpo"]
seeds = [0, 1]
processes = 2
[settings.run]
iterations = 40
threads = 1
device = "cpu"
trackers = []
checkpoint_every = 2
[settings.evaluation]
every = 20
[settings.rollout]
tasks = 4
max_tokens = 3
[tasks.two]
env = {name = "held:Held", wording = "terse"}
"""
HELD = """
import sys, time
from pathlib import Path
from collm.envs.agree import Agree

class Held(Agree):
    def reset(self, *arguments, **named):
        while Path(GATE).exists() and [*Path(sys.argv[3], "checkpoints").glob("*")]:
            time.sleep(0.05)
        return super().reset(*arguments, **named)
"""
"""An environment in which a run waits after its first checkpoint while the file GATE exists."""


def strip(plain):
    """Without seconds."""
    if isinstance(plain, dict):
        return {key: strip(value) for key, value in plain.items() if key != "seconds"}
    return [strip(value) for value in plain] if isinstance(plain, list) else plain


def results(folder: Path):
    return strip(json.loads((folder / "results.json").read_text()))


@contextmanager
def two_nodes(environment: dict[str, str]) -> Iterator[tuple[str, subprocess.Popen, subprocess.Popen, dict[str, str]]]:
    """(address, both nodes, environment of the driver)."""
    port = free_port()
    place = f"127.0.0.1:{port}"
    environment = {**environment, **OWN}
    with tempfile.TemporaryDirectory(prefix="collm-test-", dir="/tmp") as folder:
        head = node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", environment=environment)
        with head as first, node(f"--address={place}", environment=environment) as second:
            yield place, first, second, environment


def command(recipe: Path, folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "collm.cli.main", "compare", str(recipe), "--json", "--folder", str(folder), *more]


def cells(parent: int) -> list[str]:
    """Command lines of the runs that `parent` began."""
    return [words for words in below(parent).values() if "collm.training.cell" in words]


@pytest.mark.slow
def test_runs_are_on_both_nodes_and_one_of_them_is_lost(tmp_path):
    recipe, gate = tmp_path / "small.toml", tmp_path / "gate"
    recipe.write_text(RECIPE)
    (tmp_path / "held.py").write_text(HELD.replace("GATE", repr(str(gate))))
    ours = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command(recipe, tmp_path / "here"), check=True, capture_output=True, env=ours)
    gate.touch()
    with two_nodes(ours) as (place, first, second, environment):
        words = command(recipe, tmp_path / "there", "--cluster", place)
        study = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        kept = tmp_path / "there" / "two"
        until(lambda: study.poll() is not None or all((kept / f"magrpo-seed{n}" / "checkpoints").is_dir() for n in (0, 1)))
        placed = [len(cells(one.pid)) for one in (first, second)]
        kill_all(second)
        gate.unlink()
        said = study.communicate(timeout=600)[1]
        assert study.returncode == 0, said
        assert placed == [1, 1]
        assert "was lost; it goes on elsewhere (2 restarts left)" in said
        assert results(tmp_path / "there") == results(tmp_path / "here")

        gate.touch()
        cut = command(recipe, tmp_path / "cut", "--cluster", place)  # on the node that is left
        study = subprocess.Popen(cut, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        until(lambda: study.poll() is not None or (tmp_path / "cut" / "two" / "magrpo-seed1" / "checkpoints").is_dir())
        study.send_signal(signal.SIGINT)
        said = study.communicate(timeout=120)[1]
        assert "stopped by SIGINT; the running runs are saved" in said
        until(lambda: not running(str(tmp_path / "cut")), 30)
    gate.unlink()
    subprocess.run(command(recipe, tmp_path / "cut"), check=True, capture_output=True, env=ours)  # continues without a cluster
    assert results(tmp_path / "cut") == results(tmp_path / "here")
