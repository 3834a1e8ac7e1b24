"""A team on Ray Serve: what it is asked to start, what is refused, and that a lost replica loses no request."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import below, kill_all, line_of, until
from served import greedy, played, spoken
from servers import free_port

from collm.cli.main import main
from collm.cli.serve_team import agents_of, replicas_of
from collm.cluster import deployments
from collm.cluster.deployments import Deployed, Served, deployment_options, gpu_share, refuse_remote
from collm.engines.http import HttpEngine, endpoint
from collm.errors import ConfigError, PartLost, RunError
from collm.serving.batcher import BATCH
from collm.settings.load import parse_config
from collm.training.trainer import Trainer
from collm.types import Message, Request, Sampling

AGENTS = ("agent_0", "agent_1", "agent_2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three agents, each with weights of its own."""
    config = parse_config(
        {
            "run": {"name": "run", "folder": str(tmp_path_factory.mktemp("runs")), "iterations": 1, "threads": 1,
                    "trackers": []},
            "env": {"name": "agree", "wording": "terse", "agents": 3, "turns": 2},
            "algorithm": {"name": "magrpo"},
            "rollout": {"tasks": 2, "max_tokens": 6},
            "learner": {"lr": 1e-3},
            "evaluation": {"every": 0, "episodes": 6},
        }
    )  # fmt: skip
    return Trainer(config, quiet=True).run()


def test_an_agents_replicas_become_ray_serves_options():
    fixed = deployment_options(Served("a", Path("run"), (2, 2), {}), 0.5)
    assert fixed["num_replicas"] == 2
    assert "autoscaling_config" not in fixed
    assert fixed["ray_actor_options"] == {"num_cpus": 0, "num_gpus": 0.5}
    assert fixed["max_ongoing_requests"] == BATCH == 64  # as many as one engine call answers
    by_load = deployment_options(Served("a", Path("run"), (1, 4), {}), 0.0)
    assert "num_replicas" not in by_load
    assert by_load["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 0.4 * 64}


@pytest.mark.parametrize(
    ("num_replicas", "num_gpus", "share"), [(3, 0, 0), (1, 4, 1), (3, 3, 1), (3, 2, 0.5), (3, 1, 0.3333), (7, 2, 0.25)]
)
def test_replicas_share_gpus_so_that_all_have_room(num_replicas, num_gpus, share):
    assert gpu_share(num_replicas, num_gpus) == share
    assert num_gpus == 0 or int(1 / share) * num_gpus >= num_replicas


def test_replicas_are_read_by_agent():
    found = replicas_of(["agent_0=2", "my agent=1-4"], ["agent_0", "agent_1", "my agent"])
    assert found == {"agent_0": (2, 2), "agent_1": (1, 1), "my agent": (1, 4)}


@pytest.mark.parametrize("word", ["agent_0", "2", "=2", "agent_0=0", "agent_0=3-2", "agent_0=two", "agent_0=1-", "agent_0=-1"])
def test_replicas_that_cannot_be_read_are_refused(word):
    with pytest.raises(ConfigError, match=r"is neither AGENT=N nor AGENT=N-M, such as agent_0=2"):
        replicas_of([word], ["agent_0"])


def refusal(capsys, *words: str) -> str:
    begun = time.monotonic()
    assert main(["serve", *words]) == 2
    assert time.monotonic() - begun < 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("collm: ")
    assert err.count("\n") == 1
    return err


def test_what_cannot_be_served_is_one_sentence(capsys, run, tmp_path):
    local = (str(run), "--all", "--cluster.address", "local")
    error = refusal(capsys, *local, "--replicas", "helper=2")
    assert "no agent 'helper' in this run; its agents are agent_0, agent_1, agent_2." in error
    assert "names agent_0 twice" in refusal(capsys, *local, "--replicas", "agent_0=1", "--replicas", "agent_0=2")
    assert "Add --cluster.address local" in refusal(capsys, str(run), "--all")
    assert "Add --cluster.address local" in refusal(capsys, str(run), "--all", "--cluster.address", "none")
    assert "is not the address of a Ray cluster" in refusal(capsys, str(run), "--all", "--cluster.address", "here")
    assert "--learner.lr does not apply" in refusal(capsys, *local, "--learner.lr", "1")
    assert "--record writes what one process answers" in refusal(capsys, *local, "--record", str(tmp_path / "record"))
    assert "is not a run directory" in refusal(capsys, str(tmp_path / "nothing"), *local[1:])
    assert "holds one model" in refusal(capsys, str(run / "final" / "agent_0"), *local[1:])
    assert "no checkpoint after 77" in refusal(capsys, *local, "--checkpoint", "77")
    assert "--cluster.address is for a team" in refusal(capsys, str(run), "--agent", "agent_0", *local[2:])
    assert "--replicas is for a team" in refusal(capsys, str(run), "--agent", "agent_0", "--replicas", "agent_0=2")


def test_without_ray_serve_the_extra_is_named(capsys, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.serve", None)
    error = refusal(capsys, str(run), "--all", "--cluster.address", "local")
    assert "Install the extra `cluster-serve`" in error


# --- with a stand-in for Ray Serve --------------------------------------------------------------------------------------


class Serve(types.ModuleType):
    """Ray Serve with these applications; what it is asked to delete is gone at once."""

    def __init__(self, **statuses: str):
        super().__init__("ray.serve")
        self.applications = {
            agent: SimpleNamespace(status=status, message="the replica died", deployments={})
            for agent, status in statuses.items()
        }
        self.lost: Exception | None = None
        self.ended = False

    def status(self) -> SimpleNamespace:
        if self.lost is not None:
            raise self.lost
        return SimpleNamespace(applications=dict(self.applications))

    def delete(self, agent: str, *, _blocking: bool) -> None:
        del self.applications[agent]

    def shutdown(self) -> None:
        self.ended = True


@pytest.fixture
def serve(monkeypatch):
    """A function that puts a stand-in where `from ray import serve` finds it."""
    ray = pytest.importorskip("ray")

    def put(**statuses: str) -> Serve:
        found = Serve(**statuses)
        monkeypatch.setitem(sys.modules, "ray.serve", found)
        monkeypatch.setattr(ray, "serve", found, raising=False)
        return found

    return put


def test_an_agent_that_fails_is_named_once_until_it_works_again(serve, capsys):
    there = serve(agent_0="RUNNING", agent_1="RUNNING", other="UNHEALTHY")
    served = Deployed({"agent_0": "http://a", "agent_1": "http://b"})
    served.watch()
    assert capsys.readouterr().err == ""  # what others run is not judged
    there.applications["agent_1"].status = "UNHEALTHY"
    served.watch()
    served.watch()
    assert capsys.readouterr().err == "collm: not every replica of agent_1 works: the replica died\n"
    there.applications["agent_1"].status = "RUNNING"
    served.watch()
    there.applications["agent_1"].status = "UNHEALTHY"
    served.watch()
    assert "agent_1" in capsys.readouterr().err


def test_a_removed_agent_or_a_lost_cluster_ends_the_command(serve):
    ray = pytest.importorskip("ray")
    there = serve(agent_0="RUNNING")
    served = Deployed({"agent_0": "http://a", "agent_1": "http://b"})
    with pytest.raises(PartLost, match="agent_1 was removed from the cluster"):
        served.watch()
    for there.lost in (RuntimeError("gone"), ray.exceptions.RayActorError()):
        with pytest.raises(PartLost, match="the cluster that serves the team is lost"):
            served.watch()


def test_only_the_teams_own_agents_are_awaited(serve):
    serve(agent_0="RUNNING", other="DEPLOYING")
    deployments._wait_until_running(["agent_0"])
    serve(agent_0="DEPLOY_FAILED")
    with pytest.raises(RunError, match="agent_0 cannot be served: the replica died"):
        deployments._wait_until_running(["agent_0"])


def test_the_end_removes_the_team_and_leaves_what_others_serve(serve):
    there = serve(agent_0="RUNNING", other="RUNNING")
    deployments._end(["agent_0"], own=False)
    assert list(there.applications) == ["other"]
    assert not there.ended
    deployments._end(["other"], own=False)
    assert there.ended


@pytest.mark.parametrize(("host", "port", "words"), [("127.0.0.1", 8000, "only that node reaches"), ("0.0.0.0", 0, "Name one")])
def test_a_proxy_on_another_machine_needs_an_address_that_can_be_reached(host, port, words):
    with pytest.raises(ConfigError, match=f"10.0.0.7.*{words}"):
        refuse_remote("10.0.0.7", host, port)
    refuse_remote("10.0.0.7", "0.0.0.0", 8000)


def test_the_best_checkpoint_is_the_same_for_every_replica(run, monkeypatch):
    assert agents_of(run, "final") == (AGENTS, "final", "final weights")
    monkeypatch.setattr("collm.runs.weights.best_iteration", lambda *_: 1)
    assert agents_of(run, "best") == (AGENTS, "1", "weights after 1 iterations (best)")


def test_the_key_is_not_shown():
    assert "secret" not in repr(Served("a", Path("run"), (1, 1), {"key": "secret"}))


# --- on Ray Serve itself -------------------------------------------------------------------------------------------------


def require_ray_serve() -> None:
    for name in ("ray", "grpc_reflection", "opencensus"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed here, so nothing was tried on Ray Serve; `make test-clients` has it")
    pytest.importorskip("ray.serve")


@pytest.mark.slow
def test_a_missing_cluster_is_one_sentence_within_five_seconds(capsys, run, monkeypatch):
    require_ray_serve()
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    error = refusal(capsys, str(run), "--all", "--cluster.address", f"127.0.0.1:{free_port()}")
    assert "no Ray cluster answers at 127.0.0.1:" in error


@contextmanager
def team_served(run: Path, errors: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A `collm serve --all` process on a cluster of its own, and the agents' addresses. It is killed at the end."""
    command = [sys.executable, "-m", "collm.cli.main", "serve", str(run), "--all", "--cluster.address", "local"]
    with errors.open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1", *words],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            process_group=0,
        )
    try:
        lines = [line_of(process) for _ in AGENTS]
        assert all("answers at http://127.0.0.1:" in line for line in lines), errors.read_text()
        yield process, {agent: line.split()[-1] for agent, line in zip(AGENTS, lines, strict=True)}
    finally:
        kill_all(process)
        process.communicate()


def replicas_below(process: subprocess.Popen[str], agent: str) -> list[int]:
    return [pid for pid, words in below(process.pid).items() if words.startswith(f"ray::ServeReplica:{agent}:")]


@pytest.mark.slow
def test_a_team_on_ray_serve_loses_no_request_with_a_replica_and_plays_the_episodes_of_evaluate(run, tmp_path):
    """200 requests at once to three agents; one of two replicas is killed while it has requests; nothing runs on afterwards."""
    require_ray_serve()
    with team_served(run, tmp_path / "errors", "--replicas", "agent_0=2") as (process, places):
        everything = below(process.pid)
        engine = HttpEngine({agent: endpoint(agent, place) for agent, place in places.items()}, concurrency=200)
        sampling = Sampling(5.0, max_tokens=400)  # long answers
        requests = [Request(AGENTS[n % 3], (Message("user", f"Name {n} colours."),), sampling, seed=n) for n in range(200)]
        doomed, spared = replicas_below(process, "agent_0")
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(engine.generate, requests)
            until(lambda: engine.sent == 200)
            time.sleep(1)
            assert not answers.done()
            os.kill(doomed, signal.SIGKILL)
            assert [answer.error for answer in answers.result()] == [""] * 200
        assert [answer.agent for answer in answers.result()] == [request.agent for request in requests]
        assert all(answer.token_ids is not None and len(answer.token_ids) for answer in answers.result())
        assert engine.sent > 200  # some requests were with the killed replica, and were sent again
        assert spared in replicas_below(process, "agent_0")

        words = [word for agent, place in places.items() for word in ("--agent", f"{agent}={place}")]
        code, out, err = played(str(run), *words, "--json", "--show", timeout=300)
        assert code == 0, err
        record = json.loads(out)
        there = [
            [{a: (s["text"], s["prompt_ids"], s["token_ids"]) for a, s in turn["agents"].items()} for turn in episode["turns"]]
            for episode in record["played"]
        ]
        assert there == [spoken(episode) for episode in greedy(run)]
        assert record["cost_per_episode"]["team"]["requests"] >= 2 * 3

        everything |= below(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to every process of the group
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, (tmp_path / "errors").read_text()
        assert out.splitlines()[-1] == "The team has stopped."  # Ray names the killed replica above it
        until(lambda: not everything.items() & below(0).items(), 60)
