"""`collm serve RUN --all`: every agent of a team on Ray Serve."""

from __future__ import annotations

import argparse
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from collm.cli.serve import warn_of_others
from collm.errors import ConfigError, RunError
from collm.machine import usable_cores
from collm.runs.directory import run_config
from collm.runs.weights import find_weights, saved_agents
from collm.settings.checks import is_address

WATCHED = 5.0
"""Seconds between two checks that the cluster is there."""


def serve_team(arguments: argparse.Namespace, key: str) -> int:
    """Serve until SIGTERM or Ctrl-C. key: the API key, or ""."""
    run = arguments.run.absolute()
    address = address_of(arguments.overrides)
    if arguments.record is not None:
        raise ConfigError(
            "--record writes what one process answers. Leave it out; GET /AGENT/metrics has numbers of a replica."
        )
    agents, checkpoint, what = agents_of(run, arguments.checkpoint)
    replicas = replicas_of(arguments.replicas, agents)

    from collm.cluster.deployments import Served, deployed, require_serve
    from collm.cluster.start import Cluster
    from collm.serving.server import is_loopback

    require_serve()
    loopback = is_loopback(arguments.host)
    options = {
        "checkpoint": checkpoint,
        "device": arguments.device,
        "threads": arguments.threads or max(1, usable_cores() // sum(least for least, _ in replicas.values())),
        "key": key,
        "max_tokens": arguments.max_tokens,
        "local": loopback and not key,
    }
    team = [Served(agent, run, replicas[agent], options) for agent in agents]
    with (
        closing(Cluster.connect(address)) as cluster,
        deployed(cluster, team, device=arguments.device, host=arguments.host, port=arguments.port) as served,
    ):
        if not key and not loopback:
            warn_of_others(arguments.host)
        stop = threading.Event()
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        for agent, place in served.addresses.items():
            print(f"{agent} of {arguments.run} ({what}) answers at {place}", flush=True)
        while not stop.wait(WATCHED):
            served.watch()
        for number, handler in before.items():
            signal.signal(number, handler)  # a second signal stops at once
    print("The team has stopped.", flush=True)
    return 0


def address_of(overrides: Mapping[str, Any]) -> str:
    """The cluster's address on the command line. Raises ConfigError."""
    for name in overrides.keys() - {"cluster.address"}:
        raise ConfigError(f"--{name} does not apply to `collm serve`, which takes --cluster.address alone.")
    address = overrides.get("cluster.address", "none")
    if address == "none":
        raise ConfigError(
            "--all serves a team on a Ray cluster, and none is named. Add --cluster.address local to start one here, auto, or "
            "HOST:PORT."
        )
    try:
        is_address(str(address), "cluster.address")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return str(address)


def agents_of(run: Path, checkpoint: str) -> tuple[tuple[str, ...], str, str]:
    """(names of a run's agents, the checkpoint that all replicas load, description of their weights).

    The best checkpoint gets its number here: a replica that starts later might find another one best. Raises RunError or
    ConfigError.
    """
    if (run / "tokenizer_config.json").is_file():
        raise ConfigError(f"{str(run)!r} holds one model, and --all is for run directories. Serve it with --agent NAME.")
    if not run.is_dir():
        raise RunError(f"{str(run)!r} is not a run directory.")
    config = run_config(run, {}, playing=False)
    weights, what = find_weights(run, checkpoint)
    agents = saved_agents(weights or run / "final", shared=config.team.shared)
    if not agents:
        raise RunError(
            f"run {str(run)!r} has no final weights, which name its agents. Finish it, or serve one with --agent NAME."
        )
    if checkpoint == "best":
        checkpoint = "start" if weights is None else str(int(weights.name))
    return agents, checkpoint, what


def replicas_of(given: Sequence[str], agents: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Parse AGENT=N and AGENT=N-M: agent -> least and greatest number of replicas, 1 by default. Raises ConfigError."""
    found: dict[str, tuple[int, int]] = {}
    for word in given:
        agent, _, counts = word.rpartition("=")
        parts = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", counts, re.ASCII)
        least, most = (int(parts[1]), int(parts[2] or parts[1])) if parts else (0, 0)
        if not agent or not 1 <= least <= most:
            raise ConfigError(
                f"--replicas {word!r} is neither AGENT=N nor AGENT=N-M, such as {agents[0]}=2, or {agents[0]}=1-4 by load."
            )
        if agent not in agents:
            raise ConfigError(f"--replicas {word}: no agent {agent!r} in this run; its agents are {', '.join(agents)}.")
        if agent in found:
            raise ConfigError(f"--replicas names {agent} twice. Leave one out.")
        found[agent] = (least, most)
    return {agent: found.get(agent, (1, 1)) for agent in agents}
