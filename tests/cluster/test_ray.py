"""Agents apart on Ray itself: one cluster for this file, and commands in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest
from processes import below, kill_all, running, until
from ray_nodes import OWN, command, node
from servers import free_port
from test_seats import check_same, config_of, trained

from collm.cluster import reach, start
from collm.cluster.places import Device, Place
from collm.cluster.seats import Machine, Seat, machine
from collm.cluster.start import Cluster
from collm.errors import ConfigError, EngineError, PartLost
from collm.training.signals import Interrupted, Signals
from collm.training.trainer import Trainer

pytest.importorskip("ray", reason="ray is not installed, so nothing was tried on it: pip install 'collm[cluster]'")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A local cluster that all runs of this process use."""
    cluster = Cluster.connect("local")
    folder = str(cluster.folder)
    yield cluster
    cluster.close()
    assert running(folder) == []
    assert not Path(folder).exists()


def test_agents_apart_are_one_process(tmp_path, cluster):
    """Two agents and a critic: metrics, episodes, checkpoints and final folders, to the bit."""
    apart = trained(config_of("collm-cc", tmp_path, address="local"))
    check_same(trained(config_of("collm-cc", tmp_path)), apart)


def test_a_local_cluster_serves_nobody_without_its_token(cluster):
    import grpc
    import ray

    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        for metadata in ([], [("authorization", f"Bearer {'0' * 64}")]):
            with pytest.raises(grpc.RpcError) as refused:
                call(b"", metadata=metadata, timeout=20)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        call(b"", metadata=[("authorization", f"Bearer {start._TOKEN}")], timeout=20)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_local_cluster_listens_on_this_machine_alone(cluster):
    pids = [pid for pid, words in below(os.getpid()).items() if str(cluster.folder) in words or words.startswith("ray::")]
    assert len(pids) >= 2  # gcs_server and raylet at least
    inodes = {link[8:-1] for pid in pids for link in links(pid) if link.startswith("socket:[")}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}
    assert "0100007F" in listening  # 127.0.0.1
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def links(pid: int) -> list[str]:
    """What the open files of a process are."""
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(os.readlink(path))
        except OSError:
            continue
    return found


def test_errors_of_seats_are_our_own_and_a_lost_seat_is_named(tmp_path, cluster):
    trainer = Trainer(config_of("magrpo", tmp_path, address="local"), quiet=True)
    with pytest.raises(ValueError, match=r"^it holds other tensors than this team"):
        trainer.learner.restore(lambda name: {})
    process = trainer.engine.homes["agent_1"].ask("started")()
    assert os.getpriority(os.PRIO_PROCESS, process) == os.getpriority(os.PRIO_PROCESS, 0)  # Ray's default is 15 more
    os.kill(process, signal.SIGKILL)
    with pytest.raises(PartLost, match=r"^the process of agent_1 was lost"):
        trainer.run()
    trainer.engine.close()


def test_a_call_that_was_answered_is_not_waited_for(cluster):
    class Slow(Seat):
        def work(self) -> str:
            time.sleep(2)
            return "done"

    seat = cluster.seat("slow", Place(here(), 0.0), Slow)
    seat.ask("started")()
    assert cluster.waiting() == {}
    call = seat.ask("work")
    assert {name: what for name, (what, _) in cluster.waiting().items()} == {"slow": "work"}
    until(lambda: not cluster.waiting(), 60)  # nobody has fetched the answer
    assert call() == "done"


@pytest.mark.slow
@pytest.mark.parametrize("way", ["result", "first"])
def test_a_signal_while_a_seat_works_is_an_interrupted_run(cluster, way):
    """The seat works for longer than the second after which Ray looks for signals, and then answers."""

    class Slow(Seat):
        def work(self) -> str:
            time.sleep(5)
            return "done"

    seat, signals = cluster.seat("slow", Place(here(), 0.0), Slow), Signals()
    seat.ask("started")()
    with signals.listen():
        call = seat.ask("work")
        Timer(1.5, os.kill, [os.getpid(), signal.SIGTERM]).start()
        begun = time.monotonic()
        with pytest.raises(Interrupted), signals.at_once():
            cluster.first([call]) if way == "first" else call()
        assert time.monotonic() - begun < 4
    assert call() == "done"


def here() -> Device:
    """The node of this process."""
    import ray

    return Device(ray.get_runtime_context().get_node_id(), "cpu", 0)


def unused_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("way", ["address", "auto"])
def test_a_missing_cluster_is_one_sentence_within_five_seconds(monkeypatch, way):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    place = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", place)
    begun = time.monotonic()
    with pytest.raises(ConfigError, match=r"^no Ray cluster answers at [\d.]+:\d+ \(.*refused\)\. Start one there"):
        Cluster.connect(place if way == "address" else "auto")
    assert time.monotonic() - begun < 5


def test_rays_errors_are_its_first_sentences_without_its_names():
    died = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: Seat\n\tactor_id: d24b4f33\n\tpid: 19912\n"
        "\tnamespace: c18fa6d0-f78d\n\tip: 10.77.3.2\nThe actor died because its node has died. Node Id: ecc4c699\n"
    )
    assert start.sentence(RuntimeError(died)) == (
        "The actor died unexpectedly before finishing this task. The actor died because its node has died."
    )
    assert start.sentence(RuntimeError("One sentence. " * 40)) == " ".join(["One sentence."] * 21)
    assert start.sentence(RuntimeError("x" * 400)) == "x" * 300 + " ..."
    assert start.sentence(RuntimeError()) == "RuntimeError."


def test_rays_messages_are_a_line_each_on_stderr(cluster, capsys):
    import ray

    message = "Raylet is terminated. Termination is unexpected.\nLast 20 lines of its logs:\n    [state-dump] 0 total\n"
    printed = ray._private.worker.print_to_stdstream
    printed({"lines": [message], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    assert capsys.readouterr() == ("", "Ray: Raylet is terminated.\n")


def test_an_address_that_swallows_connections_is_refused_in_time():
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        begun = time.monotonic()
        with pytest.raises(ConfigError, match="no Ray cluster answers"):
            reach.probe(f"127.0.0.1:{full.getsockname()[1]}", "cluster.address")
        assert time.monotonic() - begun < 5
        for one in waiting:
            one.close()


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^compare\.cluster needs .*Install the extra `cluster`.*compare\.cluster='none'"):
        Cluster.connect("local", "compare.cluster")


def test_too_little_shared_memory_is_one_sentence_about_the_setting(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    usage = type("Usage", (), {"free": 64 << 20})
    monkeypatch.setattr(start.shutil, "disk_usage", lambda path: usage)
    for setting in ("cluster.address", "compare.cluster"):
        with pytest.raises(
            ConfigError,
            match=rf"^{setting}='local' needs \d+ MiB .*/dev/shm has 64 MiB free\. Make it larger.* {setting}='none'",
        ):
            Cluster.connect("local", setting)


@pytest.mark.parametrize("what", ["Python", "torch", "collm's source"])
def test_another_version_on_a_node_is_refused(what):
    here = machine()
    start.check_versions(here, machine(), "here")
    there = Machine({**here.versions, what: "1.0"}, here.memory, here.gpus)
    with pytest.raises(
        ConfigError, match=rf"^the cluster's node n7 has {what} 1\.0, and this process has .*\. Install the same"
    ):
        start.check_versions(here, there, "n7")


def test_a_second_close_does_not_call_ray(monkeypatch):
    import ray

    called = []
    for name in ("init", "wait", "shutdown"):
        monkeypatch.setattr(ray, name, lambda *arguments, **more: called.append(arguments))
    one = Cluster(started=False)
    one.close()
    assert len(called) == 1
    one.close()
    assert len(called) == 1


def test_a_process_that_the_memory_monitor_ended_is_lost():
    from ray import exceptions

    assert issubclass(exceptions.OutOfMemoryError, start.losses())
    assert not issubclass(exceptions.ObjectStoreFullError, start.losses())


@pytest.mark.parametrize("kind", ["ObjectStoreFullError", "OutOfDiskError"])
def test_no_room_for_what_travels_is_one_sentence(monkeypatch, kind):
    import ray

    def full(given):
        raise getattr(ray.exceptions, kind)("Failed to put object.\nIts size is 9 bytes.")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(EngineError, match=r"^the cluster has no room .*Its size is 9 bytes\. .*Free the disk of /tmp, or make"):
        Cluster.share(b"episodes")


# --- commands ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_seat_is_made_again_and_the_run_ends_equal(tmp_path):
    subprocess.run(command(tmp_path, "--run.name", "whole"), check=True, capture_output=True)
    apart = subprocess.Popen(
        command(tmp_path, "--run.name", "apart", "--cluster.address", "local"), stderr=subprocess.PIPE, text=True
    )
    until((tmp_path / "apart" / "checkpoints" / "000001").exists)
    seats = [pid for pid, words in below(apart.pid).items() if words.startswith("ray::Seat")]
    assert len(seats) == 3
    os.kill(seats[1], signal.SIGKILL)
    _, said = apart.communicate(timeout=300)
    assert apart.returncode == 0, said
    assert "was lost" in said
    assert "Restarting (3 left)." in said
    check_same(tmp_path / "whole", tmp_path / "apart")


@pytest.mark.slow
def test_a_killed_rollout_worker_is_made_again_and_the_run_ends_equal(tmp_path):
    """Two workers, one of them killed: no restart from a checkpoint, and the run of one process with the same shards."""
    subprocess.run(command(tmp_path, "--run.name", "whole", "--rollout.shards", "3"), check=True, capture_output=True)
    words = command(tmp_path, "--run.name", "apart", "--rollout.shards", "3", "--cluster.address", "local")
    apart = subprocess.Popen([*words, "--cluster.rollouts", "2"], stderr=subprocess.PIPE, text=True)
    until(lambda: apart.poll() is not None or (tmp_path / "apart" / "checkpoints" / "000001").exists())
    players = [pid for pid, name in below(apart.pid).items() if name.startswith("ray::Player")]
    assert len(players) == 2
    os.kill(players[0], signal.SIGKILL)
    _, said = apart.communicate(timeout=300)
    assert apart.returncode == 0, said
    assert "was lost. It is made again (2 restarts left)." in said
    assert "Restarting" not in said
    check_same(tmp_path / "whole", tmp_path / "apart")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_runs_on_after_the_command(tmp_path, number):
    run = subprocess.Popen(
        command(tmp_path, "--run.name", "apart", "--cluster.address", "local", "--run.iterations", "1000"),
        stderr=subprocess.PIPE, text=True, process_group=0,
    )  # fmt: skip
    until((tmp_path / "apart" / "checkpoints" / "000001").exists)
    begun = below(run.pid)
    assert any("raylet" in words for words in begun.values())
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # as a terminal sends it: to every process of the group
    else:
        os.kill(run.pid, number)
    _, said = run.communicate(timeout=120)
    if number == signal.SIGINT:
        assert run.returncode == 128 + number, said
        assert "--resume" in said
    until(lambda: not begun.items() & below(0).items(), 120)


@pytest.mark.slow
def test_two_nodes_train_and_one_of_them_is_lost(tmp_path):
    """By address and token: seats are on both nodes, and after the loss of one on the other; the run ends equal."""
    subprocess.run(command(tmp_path, "--run.name", "whole"), check=True, capture_output=True)
    port = free_port()
    place = f"127.0.0.1:{port}"
    environment = {**os.environ, **OWN}
    with tempfile.TemporaryDirectory(prefix="collm-test-", dir="/tmp") as folder:
        head = node("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}", environment=environment)
        with head as first, node(f"--address={place}", environment=environment) as second:
            words = command(tmp_path, "--run.name", "apart", "--cluster.address", place)
            run = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
            until(lambda: run.poll() is not None or (tmp_path / "apart" / "checkpoints" / "000001").exists())
            seats = [[w for w in below(one.pid).values() if w.startswith("ray::Seat")] for one in (first, second)]
            kill_all(second)
            _, said = run.communicate(timeout=600)
            assert run.returncode == 0, said
            assert sorted(map(len, seats)) == [1, 2]
            assert "was lost" in said
            assert first.poll() is None  # a cluster of one's own goes on
    check_same(tmp_path / "whole", tmp_path / "apart")


GPUS = """
import os
import ray
from collm.cluster.places import Device, Place
from collm.cluster.seats import Seat
from collm.cluster.start import Cluster

class Seeing(Seat):
    def gpu(self):
        return os.environ["CUDA_VISIBLE_DEVICES"]

ray.init(num_cpus=1, num_gpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
gpu = Device(ray.get_runtime_context().get_node_id(), "cuda", 80 << 30)
places = [Place(gpu, share, number) for share, number in ((0.3333, 0), (0.45, 1), (0.6667, 0), (0.55, 1))]
cluster = Cluster.connect("local")
seats = [cluster.seat(str(number), place, Seeing) for number, place in enumerate(places)]
print(*[seat.ask("gpu")() for seat in seats])
cluster.close()
print(ray.util.placement_group_table() and [one["state"] for one in ray.util.placement_group_table().values()])
ray.shutdown()
"""


@pytest.mark.slow
def test_seats_share_gpus_as_they_were_placed_in_whatever_order_they_are_made():
    """Two logical GPUs: Ray alone puts the first two seats on one of them, the third on the other, and the last on none."""
    environment = {**os.environ, **OWN}
    done = subprocess.run([sys.executable, "-c", GPUS], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    seen, groups = done.stdout.splitlines()[-2:]
    a, c, b, d = seen.split()
    assert {a, c} == {"0", "1"}
    assert (a, c) == (b, d)
    assert groups == "['REMOVED', 'REMOVED']"


def test_a_run_that_began_on_a_strangers_cluster_asks_for_its_address_again(tmp_path):
    run = trained(config_of("magrpo", tmp_path, iterations=1))
    config = json.loads((run / "config.json").read_text())
    config["cluster"]["address"] = "10.1.2.3:6379"
    (run / "config.json").write_text(json.dumps(config))
    words = [sys.executable, "-m", "collm.cli.main", "train", "--resume", str(run)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert "name it again: --cluster.address 10.1.2.3:6379" in done.stderr
    more = ["--run.iterations", "2", "--cluster.address", "none"]
    assert subprocess.run([*words, *more], capture_output=True).returncode == 0
