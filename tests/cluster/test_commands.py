"""Commands on nodes, without Ray: what a node does with one, and which device it gets."""

from __future__ import annotations

import _thread
import math
import signal
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from collm.cluster.commands import Command, Commands, PlacedCommand, carry_out, sees
from collm.cluster.places import Device
from collm.errors import ConfigError, PartLost
from collm.runs.directory import lock
from collm.studies.compare import compare
from collm.studies.recipe import read_plan

HERE = f"collm: on {socket.gethostname()}\n"


def command(folder: Path, *words: str, **environment: str | None) -> Command:
    return Command(words, folder / "run", folder / "run.log", folder, tuple(environment.items()))


@pytest.fixture(autouse=True)
def _here():
    """The handler of this process, which a command changes."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


def test_a_command_works_in_its_folder_with_its_environment_and_log(tmp_path, monkeypatch):
    monkeypatch.setenv("ONE", "dropped")
    (tmp_path / "probe.py").write_text("import os; print(os.environ.get('ONE'), os.environ.get('TWO')); raise SystemExit(3)")
    (tmp_path / "run.log").write_text("before\n")
    assert carry_out(command(tmp_path, "probe", ONE=None, TWO="kept")) == 3
    assert (tmp_path / "run.log").read_text() == f"before\n{HERE}None kept\n"
    assert Path.cwd() != tmp_path


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
        carry_out(command(tmp_path, "probe"))
    assert (tmp_path / "run.log").read_text() == f"{HERE}saved\n"


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
    assert carry_out(command(tmp_path, "probe")) == 0
    assert (tmp_path / "run.log").read_text() == f"{HERE}True\n"


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


@pytest.mark.parametrize(
    ("at_once", "share"), [(1, 1), (2, 1), (3, 0.5), (5, 0.3333), (12, 0.1666), (13, 0.1428), (30, 0.0666)]
)
def test_gpus_are_shared_by_as_many_runs_as_there_are(at_once, share):
    found = commands("a", "a", alive="a", at_once=at_once).share
    assert found == share
    assert math.ceil(at_once / 2) * round(found, 4) <= 1  # as Ray rounds it


def test_what_is_no_secret_goes_to_the_nodes(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("collm.cluster.commands.PlacedCommand", lambda commands, command: command)
    found = dict(commands("a", alive="a").begin(["x"], tmp_path, tmp_path / "log").environment)
    assert found["WANDB_MODE"] == "online"
    assert "HF_HUB_OFFLINE" not in found  # a node's own stays
    assert "secret" not in found.values()


def test_a_command_whose_device_is_taken_is_named_once(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    monkeypatch.setattr("ray.wait", lambda references, timeout: ([], references))
    cancelled, said = [], []
    monkeypatch.setattr("ray.cancel", cancelled.append)
    for begun in (False, True):
        one = object.__new__(PlacedCommand)
        one.commands, one.command, one.code = SimpleNamespace(say=said.append), command(tmp_path), None
        one.before, one.late, one.reference, one.cancelled = one._logged(), time.monotonic() + 60, "it", False
        if begun:
            one.command.log.write_text(HERE)
        assert one.poll() is None
        one.late = 0.0
        assert [one.poll(), one.poll()] == [None, None]
        why = "its device is taken by other work of the cluster, or its node is too busy"
        assert said == [f"{tmp_path / 'run'} has not begun: {why}"]
    one.terminate()
    one.terminate()  # a second interrupt would end the wait of `carry_out`
    assert cancelled == ["it"]


def test_a_study_for_gpus_is_refused_on_a_cluster_without(tmp_path, monkeypatch):
    recipe, wanted = tmp_path / "small.toml", []
    recipe.write_text(RECIPE)

    def connect(address, device, folder, **how):
        wanted.append(device)
        raise ConfigError("enough")

    monkeypatch.setattr(Commands, "connect", connect)
    for device in ("cpu", "auto", "cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="enough"):
            compare(recipe, folder=tmp_path / "study", overrides={"run.device": device}, quiet=True)
    assert wanted == ["cpu", "auto", "cuda", "cuda"]


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
        with pytest.raises(
            ConfigError, match=r"compare\.cluster=.* is not the address of a Ray cluster\. Set 'local', 'auto', or HOST:PORT"
        ):
            read_plan(recipe, tmp_path, {"compare.cluster": wrong})
    with pytest.raises(ConfigError, match=r"compare\.cluster places whole runs on nodes.*Leave one of them out"):
        read_plan(recipe, tmp_path, {"cluster.address": "local"})
