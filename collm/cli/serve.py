"""`collm serve`: one agent, one process, one OpenAI-compatible endpoint; or all agents on Ray Serve (serve_team.py)."""

from __future__ import annotations

import argparse
import os

from collm.errors import ConfigError
from collm.machine import usable_cores
from collm.runs.files import append
from collm.runs.output import complain


def run(arguments: argparse.Namespace) -> int:
    host, port, agent = arguments.host, arguments.port, arguments.agent
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port {port} is not a port. Choose one from 1 to 65535, or 0 for any free one.")
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens} allows no answer. Give 1 or more.")
    if arguments.threads is not None and arguments.threads < 1:
        raise ConfigError(f"--threads {arguments.threads} computes nothing. Give 1 or more, or leave it out.")
    key = ""
    if arguments.api_key_env is not None:
        key = os.environ.get(arguments.api_key_env, "")
        if not key:
            raise ConfigError(f"the environment variable {arguments.api_key_env!r}, which should hold the API key, is not set.")
    if arguments.all:
        from collm.cli.serve_team import serve_team

        return serve_team(arguments, key)
    if arguments.overrides or arguments.replicas:
        given = f"--{next(iter(arguments.overrides))}" if arguments.overrides else "--replicas"
        raise ConfigError(f"{given} is for a team on Ray Serve. Leave it out, or serve all agents: --all in place of --agent.")
    if arguments.record is not None:
        append(arguments.record, "")  # fails now if the file cannot be written
    from collm.serving import server

    with server.listen(host, port) as held:  # before a model is loaded, so that a taken port fails at once
        loopback = server.is_loopback(held.getsockname()[0])
        app, what = server.load_app(
            arguments.run,
            agent,
            checkpoint=arguments.checkpoint,
            device=arguments.device,
            threads=arguments.threads or usable_cores(),
            key=key,
            max_tokens=arguments.max_tokens,
            record=arguments.record,
            local=loopback and not key,
        )
        shown, port = held.getsockname()[:2]
        shown = f"[{shown}]" if ":" in shown else shown
        if not key and not loopback:
            warn_of_others(shown)

        def ready() -> None:
            print(f"{agent} of {arguments.run} ({what}) answers at http://{shown}:{port}/v1", flush=True)

        server.run(app, held, ready)
    print(f"{agent} has stopped.", flush=True)
    return 0


def warn_of_others(shown: str) -> None:
    """Warn that a server can be reached from other machines without a key."""
    complain(f"collm: {shown} can be reached from other machines without an API key; require one with --api-key-env NAME")
