"""Ray: connects to a cluster or starts one, finds its devices, creates seats, and ends them. `commands.py` uses it."""

from __future__ import annotations

import atexit
import math
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from collm.cluster.heartbeat import Asked
from collm.cluster.places import Device, Place
from collm.cluster.reach import environment, probe, read_environment, require_ray, running, shared_memory, shorten_messages
from collm.cluster.seats import Failed, Machine, Seat, machine
from collm.errors import ConfigError, EngineError, PartLost
from collm.runs.output import complain

START = 120.0
"""Seconds that a process of the cluster has to start."""
END = 3.0
"""Seconds that seats have to close their engines before they are killed."""
IDENTIFIERS = re.compile(r"\b(?:class_name|actor_id|pid|namespace|ip|(?:Node|Owner|Worker|Lease|Job) I[dD]): \S+ ?")
LONGEST = 300
"""Characters of a message of Ray's that are shown."""
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on every system: listen on 127.0.0.1 alone
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # 15 by default: beside other work of the machine, seats would hardly run
}
"""Environment of a cluster that is started here."""
_TOKEN = secrets.token_hex(32)


class Cluster:
    """A connection to a Ray cluster, and the seats that it created there."""

    def __init__(self, *, started: bool, folder: Path | None = None):
        self.started, self.folder = started, folder
        """Whether this object started or joined Ray, and its temporary folder."""
        self.closed = False
        self.actors: list[Any] = []
        self.groups: dict[int, Any] = {}
        """Number of a GPU among the cluster's devices -> Ray's placement group, which reserves what all its seats take."""
        self.asked: dict[str, tuple[Asked, Any]] = {}
        """Seat -> what it was asked for last, if the result was not fetched, and Ray's reference to that."""
        atexit.register(self.close)

    @classmethod
    def connect(cls, address: str, setting: str = "cluster.address") -> Self:
        """Connect to "local" (a cluster that is started here), "auto" or HOST:PORT.

        A process that is connected already stays so. Raises ConfigError, which names the setting, where none answers.
        """
        require_ray(setting)
        import ray

        if ray.is_initialized():
            return cls(started=False)
        shorten_messages()
        quiet = {"log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            return cls._start(quiet, setting)
        where = running(setting) if address == "auto" else address
        probe(where, setting)
        read_environment()
        try:
            page = ray.init(address=where, **quiet).dashboard_url
        except (RuntimeError, ConnectionError, ValueError, ray.exceptions.RayError) as error:
            raise ConfigError(f"{setting}={address!r}: {sentence(error)}") from error
        if page:
            complain(f"Ray's dashboard: http://{page}")
        return cls(started=True)

    @classmethod
    def _start(cls, quiet: Mapping[str, Any], setting: str) -> Self:
        import ray

        store = shared_memory(setting)
        folder = Path(tempfile.mkdtemp(prefix="collm-ray-", dir="/tmp"))  # sockets are there: their paths must be short
        try:
            with environment({**SETTINGS, "RAY_AUTH_TOKEN": _TOKEN}):
                read_environment()
                ray.init(
                    address="local",
                    num_cpus=1,  # processes that Ray starts in advance; seats take none
                    include_dashboard=False,
                    object_store_memory=store,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder),
                    **quiet,
                )
        except BaseException as error:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, Exception):  # a plain Exception if a process of Ray's takes more than 30 s to start
                raise ConfigError(f"{setting}='local': Ray did not start: {sentence(error)}") from error
            raise
        return cls(started=True, folder=folder)

    def waiting(self) -> dict[str, Asked]:
        """Seat -> what it was asked for last and has not answered, and since when (`time.monotonic`)."""
        import ray

        references = {reference: (seat, asked) for seat, (asked, reference) in self.asked.copy().items()}
        if self.closed or not references:  # a call of Ray's would start it again
            return {}
        left = ray.wait(list(references), num_returns=len(references), timeout=0, fetch_local=False)[1]
        return dict(references[reference] for reference in left)

    def close(self) -> None:
        """End all seats, and Ray if it was started or joined here. A second call does nothing."""
        if self.closed:  # a call of Ray's would start it again
            return
        self.closed = True
        import ray

        atexit.unregister(self.close)
        with suppress(Exception):
            ray.wait([actor.ask.remote("close") for actor in self.actors], num_returns=len(self.actors), timeout=END)
        for actor in self.actors:
            with suppress(Exception):
                ray.kill(actor)
        for group in self.groups.values():
            with suppress(Exception):
                ray.util.remove_placement_group(group)
        if self.started:
            ray.shutdown()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def devices(self, wanted: str) -> list[Device]:
        """The cluster's devices for `run.device`: GPUs, or whole machines. Raises ConfigError where there is none, or where a
        node has other versions than this process."""
        here = machine()
        gpus, machines = [], []
        for node, found in self._on_nodes(machine):
            check_versions(here, found, node["NodeManagerHostname"])
            num = int(node["Resources"].get("GPU", 0))
            gpus += [Device(node["NodeID"], "cuda", memory) for memory in [*found.gpus, *[0] * num][:num]]
            machines.append(Device(node["NodeID"], "cpu", found.memory))
        if wanted.startswith("cuda") and not gpus:
            raise ConfigError(f"run.device={wanted!r}, but no node of the cluster has a GPU. Set run.device='auto'.")
        return machines if wanted == "cpu" or not gpus else gpus

    def each(self, call: Callable[..., Any], *arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call a function on every node; yields (host, its result). Raises ConfigError where a node cannot run it."""
        for node, found in self._on_nodes(call, *arguments):
            yield node["NodeManagerHostname"], found

    def _on_nodes(self, call: Callable[..., Any], *arguments: Any) -> Iterator[tuple[dict[str, Any], Any]]:
        """(node, result of a function there) for every node, in the order of their names; where the cluster was
        started here, this process calls it for its own."""
        import ray

        mine, alive = None if self.folder is None else ray.get_runtime_context().get_node_id(), self.alive()
        run = ray.remote(num_cpus=0, max_retries=0)(call)
        asked = {name: run.options(scheduling_strategy=only(name)).remote(*arguments) for name in alive if name != mine}
        for name, node in alive.items():
            try:
                yield node, call(*arguments) if name == mine else _get(asked[name], START)
            except (ray.exceptions.RayError, ImportError) as error:
                if name not in self.alive():
                    continue  # it has just been lost
                raise ConfigError(
                    f"the cluster's node {node['NodeManagerHostname']} does not run collm: {sentence(error)} Install the same "
                    "collm on every node."
                ) from error

    @staticmethod
    def alive() -> dict[str, dict[str, Any]]:
        """Ray's name of every living node -> what Ray knows of it."""
        import ray

        return {node["NodeID"]: node for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"])) if node["Alive"]}

    def head(self) -> tuple[str, bool]:
        """(address of the head node, whether this process is on it)."""
        import ray

        mine = ray.get_runtime_context().get_node_id()
        (head,) = (node for node in self.alive().values() if "node:__internal_head__" in node["Resources"])
        return str(head["NodeManagerAddress"]), head["NodeID"] == mine

    def meeting_point(self, seat: RaySeat, place: Place) -> str:
        """HOST:PORT on the node of a seat, where the ranks of its unit meet."""
        return f"{self.alive()[place.device.node]['NodeManagerAddress']}:{seat.ask('free_port')()}"

    def seat(self, name: str, place: Place, kind: type[Seat] = Seat) -> RaySeat:
        """A new process for a unit or a rollout worker, on its device."""
        import ray

        actor = (
            ray.remote(kind)
            .options(
                num_cpus=0,
                num_gpus=place.share if place.device.kind == "cuda" else 0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=self._strategy(place),
            )
            .remote()
        )
        self.actors.append(actor)
        return RaySeat(actor, name, self.asked)

    def end(self, seat: RaySeat) -> None:
        """End the process of a lost seat, which may only be out of reach."""
        import ray

        self.actors.remove(seat.actor)
        with suppress(Exception):
            ray.kill(seat.actor)

    def _strategy(self, place: Place) -> Any:
        """Ray's strategy that puts a seat on its device.

        The seats of a GPU are in one reservation. Ray would put each fraction on the fullest GPU that has room for it, in the
        order in which seats are created, and the last one might fit on none.
        """
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        node = place.device.node
        if place.device.kind != "cuda" or node not in self.alive():  # a lost node is an error at once
            return only(node)
        if place.number not in self.groups:
            on = [{"ray.io/node-id": node}]
            self.groups[place.number] = ray.util.placement_group([{"GPU": place.taken}], bundle_label_selector=on)
        return PlacementGroupSchedulingStrategy(self.groups[place.number])

    @staticmethod
    def first(calls: Sequence[Call]) -> int:
        """Wait until one of these calls has ended; returns its number."""
        references = [call.reference for call in calls]
        return references.index(_first(references))

    @staticmethod
    def share(given: Any) -> Any:
        """Put an argument where several seats read it. Raises EngineError where memory and disk are full."""
        import ray

        try:
            return ray.put(given)
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise EngineError(
                f"the cluster has no room for what its processes are to read: {sentence(error)} Free the disk of /tmp, or "
                "make /dev/shm larger (docker run --shm-size 8g)."
            ) from error


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A call of a seat that has begun. Called itself, it waits for the result."""

    seat: RaySeat
    reference: Any
    """Ray's reference to the result."""
    method: str

    def __call__(self) -> Any:
        return self.seat.result(self.reference, self.method)


class RaySeat:
    """A seat in a Ray actor."""

    def __init__(self, actor: Any, name: str, asked: dict[str, tuple[Asked, Any]]):
        self.actor, self.name, self.asked, self.begun = actor, name, asked, False

    def ask(self, method: str, *arguments: Any) -> Call:
        """Begin a call, which waits for its result when it is called."""
        if not self.begun:
            self._begin()
        reference = self.actor.ask.remote(method, *arguments)
        self.asked[self.name] = (str(arguments[0]) if method == "parts" else method, time.monotonic()), reference
        return Call(self, reference, method)

    def _begin(self) -> None:
        """Wait for the process. Raises ConfigError if it does not start, for example since its GPU is taken."""
        import ray

        try:
            _get(self.actor.ask.remote("started"), START)
        except ray.exceptions.GetTimeoutError as error:
            raise ConfigError(
                f"the process of {self.name} did not start within {START:.0f} s: its device is taken by other work of the "
                "cluster, or its node is too busy to start it. Wait for that work, or choose another cluster.address."
            ) from error
        except ray.exceptions.RayError as error:
            raise ConfigError(f"the process of {self.name} did not start: {sentence(error)}") from error
        self.begun = True

    def result(self, reference: Any, method: str) -> Any:
        """Wait for the result of a call. Raises the seat's error as it was raised there, or PartLost."""
        import ray

        try:
            answer = _get(reference)
        except losses() as error:
            raise PartLost(
                f"the process of {self.name} was lost during {method!r}: {sentence(error)} `collm train --resume` continues "
                "from the last checkpoint."
            ) from error
        except ray.exceptions.RayError as error:
            raise EngineError(f"the process of {self.name} could not answer {method!r}: {sentence(error)}") from error
        finally:
            self.asked.pop(self.name, None)
        if isinstance(answer, Failed):
            raise answer.error
        return answer


def _first(references: Sequence[Any], seconds: float = math.inf) -> Any:
    """Wait until one of these results is there; returns its reference, or None after so many seconds.

    What the handler of a signal raises is raised within a second. Ray itself loses it, and raises a SystemError that it caused.
    """
    import ray

    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if ended := ray.wait(list(references), timeout=1)[0]:
                return ended[0]
    except SystemError as error:
        raise (error.__cause__ or error) from None
    return None


def _get(reference: Any, seconds: float = math.inf) -> Any:
    """As `ray.get`, with the signals of `_first`."""
    import ray

    return ray.get(reference, timeout=0 if _first([reference], seconds) is None else None)


def losses() -> tuple[type[Exception], ...]:
    """Ray's errors for a process, a node or what they held that is gone."""
    from ray import exceptions

    return (
        exceptions.RayActorError,
        exceptions.ObjectLostError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
        exceptions.WorkerCrashedError,
        exceptions.OutOfMemoryError,  # ended by Ray's memory monitor
        exceptions.ActorUnschedulableError,
        exceptions.TaskUnschedulableError,
        exceptions.RaySystemError,
    )


def check_versions(here: Machine, found: Machine, host: str) -> None:
    """Raises ConfigError where a node has other versions than this process."""
    for what, version in here.versions.items():
        if found.versions.get(what) != version:
            raise ConfigError(
                f"the cluster's node {host} has {what} {found.versions.get(what)}, and this process has {version}. Install the "
                "same version on every node."
            )


def only(node: str) -> Any:
    """Ray's strategy that places work on one node."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(node, soft=False)


def sentence(error: BaseException) -> str:
    """The first sentences of Ray's message, without its layout, colours and names of its own."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    text = IDENTIFIERS.sub("", text).strip() or type(error).__name__
    if len(text) > LONGEST:
        whole = text[:LONGEST].rpartition(". ")[0]
        text = whole or f"{text[:LONGEST]} ..."
    return text if text.endswith((".", "!", "?")) else f"{text}."
