"""Commands on nodes, without Ray: what a node does with one, and which device it gets."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from collm.cluster.commands import Command, Commands, carry_out, sees
from collm.cluster.places import Device
from collm.errors import ConfigError, PartLost
from collm.runs.directory import lock
from collm.studies.recipe import read_plan


def command(folder: Path, *words: str, **environment: str | None) -> Command:
    return Command(words, folder / "run", folder / "run.log", folder, tuple(environment.items()))


@pytest.fixture(autouse=True)
def _here():
    """The folder and the handler of this process, which a command changes."""
    before, handler = Path.cwd(), signal.getsignal(signal.SIGINT)
    yield
    os.chdir(before)
    signal.signal(signal.SIGINT, handler)


def test_a_command_works_in_its_folder_with_its_environment_and_log(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE", "dropped")
    (tmp_path / "probe.py").write_text("import os; print(os.environ.get('ONE'), os.environ.get('TWO')); raise SystemExit(3)")
    (tmp_path / "run.log").write_text("before\n")
    assert carry_out(command(tmp_path, "probe", ONE=None, TWO="kept"), again=False) == 3
    assert (tmp_path / "run.log").read_text() == "before\nNone kept\n"


def test_an_interrupted_command_gets_sigterm(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a Ray that a script began in the background
    (tmp_path / "probe.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *a: (print('saved'), sys.exit(0)))\n"
        "open('ready', 'w').close()\ntime.sleep(600)\n"
    )

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        _thread.interrupt_main()

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        carry_out(command(tmp_path, "probe"), again=False)
    assert (tmp_path / "run.log").read_text() == "saved\n"


def test_a_second_process_waits_until_the_first_has_released_the_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "probe.py").write_text("import os; print(os.path.exists('freed'))")
    held = threading.Event()

    def hold():
        with lock(tmp_path / "run"):
            held.set()
            time.sleep(1)
            (tmp_path / "freed").touch()

    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    assert carry_out(command(tmp_path, "probe"), again=True) == 0
    assert (tmp_path / "run.log").read_text() == "True\n"


def commands(*nodes: str, alive: str, at_once: int = 2) -> Commands:
    cluster = SimpleNamespace(alive=lambda: dict.fromkeys(alive))
    return Commands(cluster, [Device(node, "cuda", 0) for node in nodes], at_once=at_once, restarts=3, say=print)


def test_the_emptiest_device_of_a_living_node_is_taken():
    three = commands("a", "b", "b", alive="ab")
    assert three.device() == 0
    three.running = [SimpleNamespace(device=number, code=code) for number, code in ((0, None), (1, None), (2, 0))]
    assert three.device() == 2  # what has ended does not count
    assert three.device(lost="b") == 0
    assert commands("a", "b", alive="b").device() == 1
    assert commands("a", alive="a").device(lost="a") == 0  # the process alone was lost
    with pytest.raises(PartLost, match="all nodes of the cluster"):
        commands("a", "b", alive="c").device()


@pytest.mark.parametrize(("at_once", "share"), [(1, 1), (2, 1), (3, 1 / 2), (5, 1 / 3)])
def test_gpus_are_shared_by_as_many_runs_as_there_are(at_once, share):
    assert commands("a", "a", alive="a", at_once=at_once).share == share


def test_a_node_sees_what_is_on_its_disk(tmp_path):
    (tmp_path / "marker").touch()
    assert sees(tmp_path / "marker", tmp_path)
    assert not sees(tmp_path / "other", tmp_path)
    assert not sees(tmp_path / "marker", tmp_path / "none")


RECIPE = """
[compare]
methods = ["magrpo"]
cluster = "auto"
[tasks.two]
env = {name = "agree", wording = "terse"}
"""


def test_the_cluster_of_a_study(tmp_path):
    recipe = tmp_path / "small.toml"
    recipe.write_text(RECIPE)
    plain, jobs = read_plan(recipe, tmp_path, {"compare.cluster": "none"})
    placed, others = read_plan(recipe, tmp_path)
    assert (plain.cluster, placed.cluster) == (None, "auto")
    assert [job.cell for job in jobs] == [job.cell for job in others]  # where runs are placed is no other study
    for wrong in ("10.0.0.1", "http://10.0.0.1:6379", "local\n"):
        with pytest.raises(ConfigError, match=r"compare\.cluster"):
            read_plan(recipe, tmp_path, {"compare.cluster": wrong})
    with pytest.raises(ConfigError, match=r"compare\.cluster places whole runs on nodes.*Leave one of them out"):
        read_plan(recipe, tmp_path, {"cluster.address": "local"})
