"""The one driver: plays any number of episodes of any protocol together, with one engine call per turn.

Training, evaluation and untrained baselines all go through `collect`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from collm import seeds
from collm.engines.base import Engine
from collm.envs import gate
from collm.envs.base import EnvMaker
from collm.errors import ConfigError, EnvError
from collm.rollout.protocols import PROTOCOLS, Play
from collm.types import Completion, Episode, Group, History, Imagined, Request, Sampling, Turn, outcome

DEFAULT_SAMPLING = Sampling()
THREADS = max(4, min(32, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2 * (os.cpu_count() or 1)))
"""How many worlds that wait are stepped at a time."""


@dataclass(frozen=True)
class Plan:
    """How episodes are played. branches: 0 plays whole episodes; G >= 2 grows a turn tree with G joint answers per node."""

    env: EnvMaker
    split: str = "train"
    protocol: str = "parallel"
    history: History = "full"
    max_turns: int | None = None
    sampling: Sampling = DEFAULT_SAMPLING
    agent_sampling: tuple[tuple[str, Sampling], ...] = ()
    branches: int = 0

    def sampling_of(self, agent: str) -> Sampling:
        return dict(self.agent_sampling).get(agent, self.sampling)


@dataclass(slots=True)
class _Seat:
    """One episode under way: its generator and what it asks for. waits: its world spends its time waiting, not computing."""

    episode: Episode
    play: Play
    requests: list[Request]
    started: float
    waits: bool


Stop = Callable[[], None]
"""Called between engine calls; raises to leave early."""


def collect(
    plan: Plan,
    engine: Engine,
    tasks: Sequence[int],
    group_seeds: Sequence[int],
    *,
    group_size: int = 1,
    stop: Stop = lambda: None,
) -> list[Group]:
    """Play a group of `group_size` episodes, or one turn tree, of each of `tasks`.

    A group shares its world's seed. Each answer's random numbers depend on that seed, the sibling, the agent and the turn
    alone, so the result does not depend on what else is played beside it. Worlds whose class has `waits = True` (they wait for
    a sandbox or a server) are reset and stepped in threads, with the same results.
    """
    if plan.branches:
        _check_decentralized(plan)
        roots = [_seat(plan, task, seed) for task, seed in zip(tasks, group_seeds, strict=True)]
        _each(_begin, roots)
        trees = _grow(plan, engine, roots, stop)
        return [Group(task, leaves) for task, leaves in zip(tasks, trees, strict=True)]
    seats = [
        _seat(plan, task, seed, sibling) for task, seed in zip(tasks, group_seeds, strict=True) for sibling in range(group_size)
    ]
    _each(_begin, seats)
    while live := [seat for seat in seats if seat.requests]:
        _advance(plan, engine, live, stop)
    episodes = [seat.episode for seat in seats]
    return [Group(task, episodes[i * group_size : (i + 1) * group_size]) for i, task in enumerate(tasks)]


def resample(
    plan: Plan,
    engine: Engine,
    episodes: Sequence[Episode],
    times: int,
    *,
    agents: Collection[str] | None = None,
    stop: Stop = lambda: None,
) -> None:
    """Draw `times` other answers of every agent at every turn, for counterfactual baselines, into `Turn.alternatives`.

    agents: of these alone; default: of all.
    """
    _check_decentralized(plan)
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t in range(len(episode.turns))
        for agent in episode.turns[t].completions
        if agents is None or agent in agents
        for _ in range(times)
    ]
    requests = []
    for number, (episode, t, agent) in enumerate(wanted):
        before = replace(episode, turns=episode.turns[:t], observations=episode.turns[t].observations)
        messages = before.history(agent, plan.history)
        seed = seeds.derive(episode.seed, episode.sibling, "alternative", number % times, t, agent)
        requests.append(Request(agent, messages, plan.sampling_of(agent), seed))
    stop()
    for episode, t, agent in wanted:
        episode.turns[t].alternatives[agent] = []
    for (episode, t, agent), completion in zip(wanted, engine.generate(requests), strict=True):
        episode.turns[t].alternatives[agent].append(completion)
        if completion.finish_reason == "error":
            episode.failure = f"{agent}, turn {t}, another answer: {completion.error}"


def imagine_silence(
    plan: Plan, episodes: Sequence[Episode], *, agents: Collection[str] | None = None, stop: Stop = lambda: None
) -> None:
    """Ask the world what each turn would have led to had one agent answered nothing and the others what they did, into
    `Turn.silent`: for difference baselines. Fresh worlds replay the recorded answers; nothing is generated.

    agents: of these alone; default: of all. Where one agent acts alone nobody is left to act, and nothing is asked. A turn that
    the world does not replay, or not without the answer, stays unknown. An episode of T turns and N agents costs
    N T (T + 1) / 2 turns of the world.
    """
    _check_decentralized(plan)
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t, turn in enumerate(episode.turns)
        if len(turn.completions) > 1
        for agent in turn.completions
        if agents is None or agent in agents
    ]

    def imagine(episode: Episode, t: int, agent: str) -> None:
        stop()
        env = plan.env.make(plan.split)
        turn = episode.turns[t]
        said = [{a: c.text for a, c in past.completions.items()} for past in episode.turns[: t + 1]]
        said[t][agent] = ""
        try:
            gate.reset(env, episode.seed, episode.task)
            for texts in said:
                _, rewards, _, _, infos = gate.step(env, texts)
        except EnvError:
            return
        reward, raw_reward, info = outcome(said[t], rewards, infos)
        turn.silent[agent] = Imagined(reward, raw_reward, dict(info.get("metrics", turn.metrics)))

    if wanted:
        _each(imagine, *zip(*wanted, strict=True), waits=_waits(plan.env.make(plan.split)))


def _check_decentralized(plan: Plan) -> None:
    """Turn trees and resampled answers replay an agent's own history, so agents must not read each other within a turn."""
    if plan.protocol not in ("parallel", "single"):
        raise ConfigError(f"rollout.protocol={plan.protocol!r} is for evaluation alone. Set rollout.protocol='parallel'.")


def _seat(plan: Plan, task: int, seed: int, sibling: int = 0) -> _Seat:
    """An episode that has not begun, in a world of its own."""
    episode = Episode(task=task, seed=seed, agents=(), sibling=sibling)
    env = plan.env.make(plan.split)
    episode.agents = tuple(env.possible_agents)
    play = PROTOCOLS[plan.protocol](env, episode, history=plan.history, max_turns=plan.max_turns)
    return _Seat(episode, play, [], time.monotonic(), _waits(env))


def _begin(seat: _Seat) -> None:
    """Play up to the first request."""
    _resume(seat, None)


def _resume(seat: _Seat, completions: list[Completion] | None) -> None:
    """Hand a seat its completions and note what it asks for next; nothing, once its episode is over."""
    try:
        seat.requests = next(seat.play) if completions is None else seat.play.send(completions)
    except StopIteration:
        seat.requests = []
        seat.episode.seconds = time.monotonic() - seat.started


def _waits(env: Any) -> bool:
    return bool(getattr(env, "waits", False))


def _each(call: Callable[..., None], items: Sequence[Any], *arguments: Sequence[Any], waits: bool | None = None) -> None:
    """`map`: in turn, or in threads where worlds wait; by default as the first item, a seat, says. Of several errors the first
    item's is raised."""
    if len(items) > 1 and (items[0].waits if waits is None else waits):
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="collm-world") as pool:
            for _ in pool.map(call, items, *arguments):
                pass
        return
    for each in zip(items, *arguments, strict=True):
        call(*each)


def _stamped(plan: Plan, seat: _Seat) -> list[Request]:
    """The seat's requests with sampling and seed. Every sibling and every branch of a tree has random numbers of its own."""
    episode = seat.episode
    keys = (episode.seed, episode.sibling, ".".join(map(str, episode.path)), len(episode.turns))

    def stamped(request: Request) -> Request:
        kind = () if request.kind == "answer" else (request.kind,)
        seed = seeds.derive(*keys, request.agent, *kind)
        return replace(request, sampling=plan.sampling_of(request.agent), seed=seed)

    return [stamped(request) for request in seat.requests]


def _advance(plan: Plan, engine: Engine, seats: Sequence[_Seat], stop: Stop) -> None:
    """Answer what every seat asks for with one engine call, and play on."""
    stop()
    asked = [_stamped(plan, seat) for seat in seats]
    answers = iter(engine.generate([request for requests in asked for request in requests]))
    _each(_resume, seats, [[next(answers) for _ in requests] for requests in asked])


def _grow(plan: Plan, engine: Engine, roots: Sequence[_Seat], stop: Stop) -> list[list[Episode]]:
    """Grow each root into a turn tree: at every node, every turn, `branches` joint answers. Returns the leaves per root.

    A node's first child goes on in the node's own world; each further child replays the recorded answers in a fresh one.
    """
    trees: list[list[_Seat]] = [[root] for root in roots]
    while True:
        nodes = [(tree, seat) for tree in trees for seat in tree if seat.requests]
        if not nodes:
            return [[seat.episode for seat in tree] for tree in trees]
        frontier: list[_Seat] = []
        branches: list[_Seat] = []
        replays: list[list[Turn]] = []
        for tree, seat in nodes:
            parent = seat.episode.path
            for child in range(plan.branches):
                branch = seat if child == 0 else _seat(plan, seat.episode.task, seat.episode.seed)
                branch.episode.path = (*parent, child)
                if child:
                    tree.append(branch)
                    branches.append(branch)
                    replays.append(seat.episode.turns)
                frontier.append(branch)
        _each(_replay, branches, replays)
        _advance(plan, engine, frontier, stop)


def _replay(seat: _Seat, turns: Sequence[Turn]) -> None:
    """Bring a fresh world to where a sibling stands by the recorded answers; these turns belong to the sibling."""
    _begin(seat)
    for turn in turns:
        _resume(seat, [turn.completions[request.agent] for request in seat.requests])
    seat.episode.own_from = len(turns)
