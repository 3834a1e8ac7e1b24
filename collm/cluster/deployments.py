"""A team on Ray Serve: one application per agent, with replicas of its own, behind one HTTP proxy on the head node.

A replica is the application of `collm serve`, without its socket.
"""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from collm.cluster.start import START, Cluster, sentence
from collm.errors import ConfigError, PartLost, RunError
from collm.runs.output import complain
from collm.serving.batcher import BATCH, QUEUE
from collm.serving.server import GRACE, is_loopback, listen, load_app

POLL = 0.5
"""Seconds between two looks at the state of the deployments."""
BUSY = 0.4
"""Autoscaling adds a replica above this part of the requests that a replica takes, as in Ray Serve's defaults (2 of 5)."""
OURS = "collm.errors."
"""Begins the line of a traceback that holds an error of ours."""


@dataclass(frozen=True, slots=True)
class Served:
    """What every replica of an agent needs."""

    agent: str
    run: Path
    """A folder that all nodes see."""
    replicas: tuple[int, int]
    """Least and greatest number of replicas; Ray Serve chooses one in between by load."""
    options: Mapping[str, Any] = field(repr=False)  # the API key is among them
    """Other arguments of `load_app`."""


@dataclass(frozen=True, slots=True)
class Deployed:
    """A team that answers."""

    addresses: Mapping[str, str]
    unhealthy: set[str] = field(default_factory=set)
    """Agents of which `watch` has named replicas that fail."""

    def watch(self) -> None:
        """Name agents whose replicas fail. Raises PartLost where the cluster is gone, or an agent was removed from it."""
        found = _applications(self.addresses)
        for agent in self.addresses:
            if agent not in found:
                raise PartLost(
                    f"{agent} was removed from the cluster, so its address answers no longer. Start the command again."
                )
            failing = found[agent].status in ("UNHEALTHY", "DEPLOY_FAILED")
            if failing and agent not in self.unhealthy:
                complain(f"collm: not every replica of {agent} works: {_reason(found[agent])}")
            (self.unhealthy.add if failing else self.unhealthy.discard)(agent)


class Replica:
    """An agent in a process of Ray Serve, which finds the application by the name of the second method."""

    def __init__(self, served: Served):
        self.built, _ = load_app(served.run, served.agent, **served.options)

    def __serve_build_asgi_app__(self) -> Any:
        return self.built


def deployment_options(served: Served, gpu_share: float) -> dict[str, Any]:
    """Options of Ray Serve's deployment of an agent. CPU cores are not reserved, as nowhere in collm."""
    least, most = served.replicas
    scaling: dict[str, Any] = {"num_replicas": least}
    if least < most:
        limits = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": BUSY * BATCH}
        scaling = {"autoscaling_config": limits}
    return {
        **scaling,
        "name": served.agent,
        "ray_actor_options": {"num_cpus": 0, "num_gpus": gpu_share},
        "max_ongoing_requests": BATCH,
        "max_queued_requests": QUEUE,
        "graceful_shutdown_timeout_s": GRACE,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_constructor_retry_count": 1,  # an error of ours is not retried
    }


def gpu_share(num_replicas: int, num_gpus: int) -> float:
    """The part of a GPU for each of so many replicas: 1 where there are enough GPUs, 0 where there is none."""
    return math.floor(10_000 / math.ceil(num_replicas / num_gpus)) / 10_000 if num_gpus else 0.0


def require_serve() -> None:
    """Raises ConfigError if Ray Serve or a package that it needs is missing."""
    try:
        importlib.import_module("ray.serve")
    except ImportError as error:
        raise ConfigError(
            f"--all needs Ray Serve, which cannot be imported ({error.name or error} is missing). Install the extra "
            "`cluster-serve` (pip install 'collm[cluster-serve]'), or serve one agent a process: --agent NAME."
        ) from error


@contextmanager
def deployed(cluster: Cluster, team: Sequence[Served], *, device: str, host: str, port: int) -> Iterator[Deployed]:
    """All agents, once they answer; afterwards answers in progress are finished.

    Raises ConfigError or RunError where they cannot be served, and PartLost where the cluster is lost meanwhile.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    status = serve.status()
    if status.proxies or status.applications:
        raise ConfigError(
            "Ray Serve runs on this cluster already, with options of its own. End it with `serve shutdown`, or set "
            "cluster.address='local'."
        )
    num_gpus = sum(found.kind == "cuda" for found in cluster.devices(device))
    for node, seen in cluster.each(Path.is_dir, team[0].run):
        if not seen:
            raise ConfigError(f"the cluster's node {node} does not see {team[0].run}. Put it on a disk that all nodes share.")
    head, here = cluster.head()
    if here:
        with listen(host, port) as held:  # fails now where the port is taken
            port = held.getsockname()[1]
    else:
        refuse_remote(head, host, port)
    quiet = {"enable_access_log": False, "log_level": "ERROR"}
    names = [served.agent for served in team]
    try:
        try:
            serve.start("HeadOnly", {"host": host, "port": port}, logging_config=quiet)
            share = gpu_share(sum(served.replicas[1] for served in team), num_gpus)
            ingress = serve.ingress()(Replica)
            targets = [
                serve.RunTarget(
                    serve.deployment(**deployment_options(served, share), logging_config=quiet)(ingress).bind(served),
                    name=served.agent,
                    route_prefix=f"/{served.agent}",
                )
                for served in team
            ]
            serve.run_many(targets, wait_for_applications_running=False)
        except (ray.exceptions.RayError, RuntimeError, TimeoutError, ValueError) as error:
            raise ConfigError(f"Ray Serve did not start: {sentence(error)}") from error
        _wait_until_running(names)
        shown = head if host in ("0.0.0.0", "::") else host
        shown = f"[{shown}]" if ":" in shown else shown
        yield Deployed({name: f"http://{shown}:{port}/{quote(name)}/v1" for name in names})
    finally:
        _end(names, own=cluster.folder is not None)


def refuse_remote(head: str, host: str, port: int) -> None:
    """Raises ConfigError where the proxy on another machine, the head node, could not be reached, or its port not be known."""
    if is_loopback(host):
        raise ConfigError(
            f"--host {host}: the proxy runs on the cluster's head node {head}, where only that node reaches {host}. Set --host "
            "0.0.0.0 and require a key (--api-key-env), or run this command there."
        )
    if port == 0:
        raise ConfigError(
            f"--port 0: the proxy runs on the cluster's head node {head}, whose free ports are not known here. Name one."
        )


def _applications(agents: Iterable[str]) -> dict[str, Any]:
    """Agent -> Ray Serve's application, for those of these agents that it has. Raises PartLost where the cluster is lost."""
    import ray
    from ray import serve

    try:
        found = serve.status().applications
    except (ray.exceptions.RayError, RuntimeError, ConnectionError) as error:
        raise PartLost(f"the cluster that serves the team is lost: {sentence(error)}") from error
    return {agent: found[agent] for agent in agents if agent in found}


def _wait_until_running(agents: Sequence[str]) -> None:
    """Wait for all agents. Raises RunError with the error of a replica that cannot load its agent, or PartLost."""
    late = time.monotonic() + START
    while True:
        found = _applications(agents)
        for agent, application in found.items():
            if application.status == "DEPLOY_FAILED":
                raise RunError(f"{agent} cannot be served: {_reason(application)}")
        waiting = [agent for agent in agents if agent not in found or found[agent].status != "RUNNING"]
        if not waiting:
            return
        if time.monotonic() > late:
            late = math.inf
            complain(
                f"collm: not every replica of {', '.join(waiting)} has started; other work of the cluster may have its device"
            )
        time.sleep(POLL)


def _reason(application: Any) -> str:
    """The error of ours in the tracebacks of an application's replicas, else their last line."""
    text = "\n".join([application.message, *(one.message for one in application.deployments.values())])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if line.startswith(OURS)]
    return ours[-1] if ours else " ".join(lines)[-300:]


def _end(agents: Sequence[str], *, own: bool) -> None:
    """Finish answers in progress, for at most GRACE seconds, and remove the agents; Ray Serve ends unless it has other work.

    own: the cluster ends right afterwards.
    """
    from ray import serve

    with suppress(Exception):  # the cluster may be gone
        late = time.monotonic() + GRACE
        for agent in _applications(agents):
            serve.delete(agent, _blocking=False)
        while _applications(agents) and time.monotonic() < late:
            time.sleep(POLL)
        if not own and not serve.status().applications:
            serve.shutdown()
