"""Commands on the nodes of a Ray cluster, each begun on the emptiest device and, after the loss of its node, on another."""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.cluster.places import Device
from collm.cluster.start import START, Cluster, losses, only
from collm.errors import ConfigError, PartLost, RunError
from collm.runs.directory import lock
from collm.runs.processes import begin_module

FREED = 60.0
"""Seconds that the process of a lost node has to save and to release its run directory."""
INHERITED = ("OMP_NUM_THREADS", "PYTHONPATH")
"""Environment variables that a command has as in the driver; Ray sets the first one for its own processes."""
PASSED = (
    "WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE",
)  # fmt: skip
"""Those that replace a node's own where the driver has them; none is a secret."""


@dataclass(frozen=True, slots=True)
class Command:
    """`python -m WORDS`, which works in a run directory."""

    words: tuple[str, ...]
    run: Path
    """The run directory; a second process there waits for the end of the first one."""
    log: Path
    """The file that its output is appended to."""
    folder: Path
    """Where it works; other paths may be relative to it."""
    environment: tuple[tuple[str, str | None], ...]
    """(variable, value, or None for no such variable)."""


def carry_out(command: Command) -> int:
    """Run a command on this node to its end. Returns its exit code. Interrupted, it sends SIGTERM and waits.

    The first line that it adds to the log shows the driver that it has begun. A process that was lost may still be saving.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # `ray.cancel`; Ray started in the background ignores SIGINT
    with command.log.open("a") as log:
        log.write(f"collm: on {socket.gethostname()}\n")
    _wait_until_free(command.run)
    environment = dict(os.environ)
    for name, value in command.environment:
        environment.pop(name, None)
        environment |= {} if value is None else {name: value}
    process = None
    try:
        process = begin_module(command.words, command.log, folder=command.folder, environment=environment)
        while process.poll() is None:
            time.sleep(0.1)
    finally:
        if process is not None:
            process.terminate()
            process.wait()
    return process.returncode


def _wait_until_free(run: Path) -> None:
    end = time.monotonic() + FREED
    while run.is_dir() and time.monotonic() < end:
        try:
            with lock(run):
                return
        except RunError:
            time.sleep(0.2)


def sees(marker: Path, folder: Path) -> bool:
    """Whether this node has a file and a folder of the driver."""
    return marker.is_file() and folder.is_dir()


class Commands:
    """Begins commands on the nodes of a cluster.

    Args:
        at_once: number of commands at the same time, at most; GPUs are shared by so many.
        restarts: number of times that a command is begun anew after a loss.
        say: called with each line of progress.
    """

    def __init__(self, cluster: Cluster, devices: Sequence[Device], *, at_once: int, restarts: int, say: Callable[[str], None]):
        self.cluster, self.devices, self.restarts, self.say = cluster, devices, restarts, say
        self.share = int(10_000 / math.ceil(at_once / len(devices))) / 10_000  # Ray rounds to four places, up as well
        self.running: list[PlacedCommand] = []

    @classmethod
    def connect(cls, address: str, wanted: str, folder: Path, **how: Any) -> Commands:
        """Connect to a cluster whose nodes all see `folder`, where commands write. Raises ConfigError.

        wanted: "cpu" for whole machines, else GPUs where there are any.
        """
        cluster = Cluster.connect(address, "compare.cluster")
        marker = folder / f".seen-{secrets.token_hex(8)}"
        try:
            devices = cluster.devices(wanted)
            folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
            for host, seen in cluster.each(sees, marker.absolute(), Path.cwd()):
                if not seen:
                    raise ConfigError(
                        f"the cluster's node {host} does not see {folder.absolute()} or {Path.cwd()}. Put both on a disk that "
                        "all nodes share."
                    )
            return cls(cluster, devices, **how)
        except BaseException:
            cluster.close()
            raise
        finally:
            marker.unlink(missing_ok=True)

    def begin(self, words: Sequence[str], run: Path, log: Path) -> PlacedCommand:
        """Begin `python -m WORDS` on the emptiest device."""
        environment = tuple((name, os.environ.get(name)) for name in (*INHERITED, *(os.environ.keys() & PASSED)))
        command = Command(tuple(words), run.absolute(), log.absolute(), Path.cwd(), environment)
        self.running.append(PlacedCommand(self, command))
        return self.running[-1]

    def device(self, lost: str | None = None) -> int:
        """Number of the device with the fewest commands, of those on living nodes; of a node that was just lost only if there
        is no other. Raises PartLost where there is none."""
        alive = self.cluster.alive()
        used = [one.device for one in self.running if one.code is None]
        left = [number for number, device in enumerate(self.devices) if device.node in alive]
        if not left:
            raise PartLost("all nodes of the cluster on which runs were placed are lost. Start again to continue.")
        return min(left, key=lambda number: (self.devices[number].node == lost, used.count(number), number))

    def close(self) -> None:
        self.cluster.close()


class PlacedCommand:
    """A command on a node; like `subprocess.Popen`."""

    def __init__(self, commands: Commands, command: Command):
        self.commands, self.command, self.left = commands, command, commands.restarts
        self.code: int | None = None
        self.cancelled = False
        self._begin(commands.device())

    def _begin(self, device_number: int) -> None:
        import ray

        self.device, self.before, self.late = device_number, self._logged(), time.monotonic() + START
        device = self.commands.devices[self.device]
        self.reference = (
            ray.remote(carry_out)
            .options(
                num_cpus=0,
                num_gpus=self.commands.share if device.kind == "cuda" else 0,
                max_retries=0,
                scheduling_strategy=only(device.node),
            )
            .remote(self.command)
        )

    def poll(self) -> int | None:
        """Its exit code; None while it runs. A lost command is begun anew."""
        import ray

        if self.code is not None:
            return self.code
        if not ray.wait([self.reference], timeout=0)[0]:
            if time.monotonic() > self.late:
                self.late = math.inf
                if self._logged() == self.before:
                    why = "its device is taken by other work of the cluster, or its node is too busy"
                    self.commands.say(f"{self.command.run} has not begun: {why}")
            return None
        self.code = self._result()
        if self.code is None:
            self.left -= 1
            self.commands.say(f"the process of {self.command.run} was lost; it goes on elsewhere ({self.left} restarts left)")
            self._begin(self.commands.device(lost=self.commands.devices[self.device].node))
        return self.code

    def _logged(self) -> int:
        """Bytes of its log."""
        return self.command.log.stat().st_size if self.command.log.exists() else 0

    def _result(self) -> int | None:
        """The exit code of a command that has ended; None if it was lost and may be begun anew."""
        import ray

        try:
            return int(ray.get(self.reference))
        except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
            return 130
        except ray.exceptions.RayError as error:
            if self.left and isinstance(error, losses()):
                return None
            with self.command.log.open("a") as log:
                log.write(f"collm: its process did not end by itself: {' '.join(str(error).split())}\n")
            return 1

    def terminate(self) -> None:
        import ray

        if self.code is None and not self.cancelled:  # a second interrupt would end the wait for its end
            self.left, self.cancelled = 0, True
            ray.cancel(self.reference)

    def wait(self) -> int:
        """Wait until it has ended; after `terminate` it is not begun anew."""
        while self.poll() is None:
            time.sleep(0.05)
        assert self.code is not None
        return self.code
