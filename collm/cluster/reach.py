"""What is checked before Ray is connected to or started, and the environment that it reads. `start.py` uses it."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from collm.errors import ConfigError
from collm.runs.output import complain

PROBE = 2.0
"""Seconds that an address has to accept a connection; without a probe Ray itself waits for 204 s."""
STORE = 2 << 30
"""Most bytes of shared memory for what travels between processes of a cluster that is started here; more goes to the disk."""
LEAST_STORE = 80 << 20


def require_ray(setting: str) -> None:
    """Raises ConfigError if the package is missing."""
    found = importlib.util.find_spec("ray")
    if found is None or found.origin is None:  # without an origin it is only a folder with this name
        raise ConfigError(
            f"{setting} needs the package ray, which is not installed. Install the extra `cluster` "
            f"(pip install 'collm[cluster]'), or set {setting}='none'."
        )


def running(setting: str) -> str:
    """HOST:PORT of the Ray cluster that this machine belongs to, or that RAY_ADDRESS names. Raises ConfigError."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        found = canonicalize_bootstrap_address("auto")
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"{setting}='auto': no Ray cluster runs here, and RAY_ADDRESS names none. Start one with `ray start --head`, or "
            f"set {setting}='local'."
        ) from error
    return str(found)


def probe(address: str, setting: str) -> None:
    """Raises ConfigError where an address accepts no connection."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({error}). Start one there with `ray start --head`, or set {setting}='local'."
        ) from error


def shared_memory(setting: str) -> int:
    """Bytes of the store for what travels. Raises ConfigError where there is too little."""
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if sys.platform == "linux" and shared.is_dir() else STORE
    if free < 2 * LEAST_STORE:
        raise ConfigError(
            f"{setting}='local' needs {2 * LEAST_STORE >> 20} MiB of shared memory, and /dev/shm has {free >> 20} MiB free. "
            f"Make it larger (docker run --shm-size 2g), or set {setting}='none'."
        )
    return max(LEAST_STORE, min(STORE, free // 2))


def read_environment() -> None:
    """Make Ray read its settings and token from the environment again; it reads them once, when it is imported."""
    raylet: Any = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    constants: Any = importlib.import_module("ray._private.ray_constants")
    constants.ENABLE_RAY_CLUSTER = constants.env_bool(constants.ENABLE_RAY_CLUSTERS_ENV_VAR, sys.platform == "linux")


def shorten_messages() -> None:
    """Ray's messages about lost processes become a line each on stderr; they hold up to 20 lines of logs and go to stdout."""

    def show(batch: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for message in batch["lines"]:
            complain(f"Ray: {str(message).strip().splitlines()[0].partition('. ')[0].rstrip('.')}.")

    worker: Any = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = show


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables in this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
