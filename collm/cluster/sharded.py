"""The driver's side of rollout workers: collector and engine of a run whose shards are played in other processes. Without ray.

A worker plays a shard whole, with the weights of the seats and nothing that an earlier shard left behind. Which worker plays a
shard, in which order they are done, and how often one is lost do not change the episodes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from collm.cluster.hands import RemoteSeat
from collm.cluster.heartbeat import Heartbeat
from collm.cluster.places import Place
from collm.cluster.players import Player, missing
from collm.cluster.seats import Contents
from collm.envs.base import EnvMaker
from collm.errors import ConfigError, PartLost
from collm.rollout.collector import cut
from collm.rollout.plan import Plan
from collm.runs.output import complain
from collm.types import Completion, Group, Request

if TYPE_CHECKING:
    from collm.cluster.start import Call, Cluster, RaySeat


class Rollouts:
    """Hands shards to rollout workers; as an engine it gives them the weights of the seats.

    Args:
        cluster: creates and ends workers.
        places: worker's name -> its place.
        make: place -> what a worker there calls to load its models.
        sources: policy -> (the seat that trains it, the name of its file in a checkpoint).
        shards: number of pieces that tasks are cut into.
        restarts: number of lost workers that are made again, at most.
        ahead: whether the seats learn while pieces are played. A worker that is made again then has its weights from another.
        say: called with each line of progress.
    """

    trains = True

    def __init__(
        self,
        cluster: Cluster,
        places: Mapping[str, Place],
        make: Callable[[Place], Callable[[], Contents]],
        sources: Mapping[str, tuple[RemoteSeat, str]],
        *,
        shards: int,
        restarts: int,
        ahead: bool = False,
        say: Callable[[str], None] = complain,
    ):
        self.cluster, self.places, self.make, self.sources = cluster, places, make, sources
        self.shards, self.restarts, self.ahead, self.say = shards, restarts, ahead, say
        self.heartbeat = Heartbeat(cluster.waiting)
        self.workers: dict[str, RaySeat] = {name: self._begin(name) for name in places}
        self.current = set[str]()
        """The workers that have the present weights."""
        self.running: dict[str, tuple[int, Call]] = {}
        """Worker -> the number of its work and its call; of a call that was left early until the next one."""
        for name, filled in [(name, self._fill(name)) for name in places]:
            try:
                filled()
            except PartLost as error:
                self._replace(name, error)

    def play(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int = 0) -> list[Group]:
        """As `Collector.play`; one worker each plays a piece."""
        return self.begin(plan, tasks, keys, iteration)()

    def begin(self, plan: Plan, tasks: Sequence[int], keys: Sequence[int], iteration: int) -> Callable[[], list[Group]]:
        """As `Background.begin`: every worker begins a piece. The returned function hands out those that are left."""
        shared = self.cluster.share(plan)
        pieces = [(shared, tasks[piece], keys[piece], iteration) for piece in cut(len(tasks), self.shards)]
        finish = self._hand_out("play", pieces)
        return lambda: [group for groups in finish() for group in groups]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One worker answers all requests."""
        (answers,) = self._hand_out("generate", [(requests,)])()
        return list(answers)

    def load(self, team: Any) -> None:
        """The seats have new weights; workers get them before they play again."""
        self.current.clear()
        self.heartbeat.beat()

    def rest(self) -> None:
        idle = [name for name in self.workers if name not in self.running]  # a stopped run does not wait for shards
        self._tell(idle, "rest")  # a lost one is made again when it is to play

    def close(self) -> None:
        self.heartbeat.stop()
        self.cluster.close()

    def _hand_out(self, method: str, work: Sequence[tuple[Any, ...]]) -> Callable[[], list[Any]]:
        """Call `method` of any worker once with each of these arguments, every worker beginning now; returns a function that
        waits for the results, in their order.

        What a lost worker was doing is given to another one. Raises PartLost when none is left that can do it.
        """
        left, results = deque(range(len(work))), dict[int, Any]()
        running = self.running = {}

        def begin(*, older: bool = False) -> None:
            self._send_weights(older=older)
            for name, worker in self.workers.items():
                if left and name not in running:
                    number = left.popleft()
                    running[name] = number, worker.ask(method, *work[number])

        def finish() -> list[Any]:
            while len(results) < len(work):
                begin(older=self.ahead)
                names = list(running)
                name = names[self.cluster.first([running[name][1] for name in names])]
                number, call = running.pop(name)
                try:
                    results[number] = call()
                except PartLost as error:
                    left.appendleft(number)
                    self._replace(name, error)
            return [results[number] for number in range(len(work))]

        begin()
        return finish

    def _send_weights(self, *, older: bool) -> None:
        """Give the present weights to the workers that do not have them; one policy at a time travels.

        older: the seats may have newer ones; a worker that has the present ones sends them. Raises PartLost if none has.
        """
        while behind := [name for name in self.workers if name not in self.current]:
            holder = next((name for name in self.workers if name in self.current), None) if older else None
            if older and holder is None:
                raise PartLost("no rollout worker is left with the weights that the iteration is played with.")
            lost: dict[str, PartLost] = {}
            for policy, (seat, file) in self.sources.items():
                call = seat.ask("tensors", file) if holder is None else self.workers[holder].ask("policy", policy)
                try:
                    data = self.cluster.share(call())
                except PartLost as gone:
                    if holder is None:
                        raise
                    lost = {holder: gone}
                    break
                lost |= self._tell([name for name in behind if name not in lost], "weights", policy, data)
            else:
                lost |= self._tell([name for name in behind if name not in lost], "renew")
                self.current |= set(behind) - set(lost)
            for name, error in lost.items():
                self._replace(name, error)

    def _tell(self, names: Iterable[str], method: str, *arguments: Any) -> dict[str, PartLost]:
        """Call a method of these workers at once; returns the workers that were lost."""
        lost = {}
        for name, call in [(name, self.workers[name].ask(method, *arguments)) for name in names]:
            try:
                call()
            except PartLost as error:
                lost[name] = error
        return lost

    def _begin(self, name: str) -> RaySeat:
        return self.cluster.seat(name, self.places[name], Player)

    def _fill(self, name: str) -> Callable[[], Any]:
        return self.workers[name].ask("fill", self.make(self.places[name]))

    def _replace(self, name: str, error: PartLost) -> None:
        """Make a lost worker again in its place, or go on without it. Raises PartLost when none is left."""
        self.cluster.end(self.workers.pop(name))
        self.current.discard(name)
        if self.restarts:
            self.restarts -= 1
            self.say(f"collm: the process of {name} was lost. It is made again ({self.restarts} restarts left).")
            self.workers[name] = self._begin(name)
            try:
                self._fill(name)()
            except Exception as reason:  # of any type, as loading a model raises it
                self.cluster.end(self.workers.pop(name))
                why = str(reason).partition("\n")[0] or type(reason).__name__
                self.say(f"collm: {name} was not made again: {why}")
        if name not in self.workers:
            self.say(f"collm: the process of {name} is lost; the other {len(self.workers)} rollout workers play its shards.")
        if not self.workers:
            raise PartLost(f"no rollout worker is left. {error}") from error


def check_everywhere(env: EnvMaker, splits: Sequence[str], cluster: Cluster) -> None:
    """Raises ConfigError where a node of the cluster cannot make the environment, or one of its splits."""
    for host, fault in cluster.each(missing, env, splits):
        if fault:
            raise ConfigError(
                f"the environment cannot be made on the cluster's node {host}: {fault} Install it there, or set "
                "cluster.rollouts=0, with which the driver alone plays it."
            )
