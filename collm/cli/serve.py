"""`collm serve`: one agent, one process, one OpenAI-compatible endpoint."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys

from collm.errors import ConfigError
from collm.machine import usable_cores
from collm.runs.examples import recorded_examples
from collm.runs.files import append
from collm.runs.weights import load_agent


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
    if arguments.record is not None:
        append(arguments.record, "")  # fails now if the file cannot be written
    from collm.serving import server

    with server.listen(host, port) as held:  # before a model is loaded, so that a taken port fails at once
        import torch

        torch.set_num_threads(arguments.threads or usable_cores())
        policy, what = load_agent(arguments.run, agent, arguments.checkpoint, device=arguments.device)
        loopback = ipaddress.ip_address(held.getsockname()[0]).is_loopback
        examples = recorded_examples(arguments.run)
        options = {"key": key, "max_tokens": arguments.max_tokens, "record": arguments.record, "local": loopback and not key}
        app = server.make_app(policy, agent, examples=examples, **options)
        shown, port = held.getsockname()[:2]
        shown = f"[{shown}]" if ":" in shown else shown
        if not key and not loopback:
            print(
                f"collm: {shown} can be reached from other machines without an API key; require one with --api-key-env NAME",
                file=sys.stderr,
            )

        def ready() -> None:
            print(f"{agent} of {arguments.run} ({what}) answers at http://{shown}:{port}/v1", flush=True)

        server.run(app, held, ready)
    print(f"{agent} has stopped.", flush=True)
    return 0
