"""The one driver: plays any number of episodes of any protocol together, with one engine call per turn.

Training, evaluation and untrained baselines all go through `collect`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from collm import seeds
from collm.engines.base import Engine
from collm.envs.base import EnvMaker
from collm.rollout.protocols import PROTOCOLS, Play
from collm.types import Completion, Episode, Group, History, Request, Sampling

DEFAULT_SAMPLING = Sampling()


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
    """One episode under way: its generator, what it asks for, and what it was asked so far."""

    episode: Episode
    play: Play
    requests: list[Request]
    started: float


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
    alone, so the result does not depend on what else is played beside it.
    """
    if plan.branches:
        roots = [_open(plan, task, seed) for task, seed in zip(tasks, group_seeds, strict=True)]
        trees = _grow(plan, engine, roots, stop)
        return [Group(task, leaves) for task, leaves in zip(tasks, trees, strict=True)]
    seats = [
        _open(plan, task, seed, sibling) for task, seed in zip(tasks, group_seeds, strict=True) for sibling in range(group_size)
    ]
    while live := [seat for seat in seats if seat.requests]:
        _advance(plan, engine, live, stop)
    episodes = [seat.episode for seat in seats]
    return [Group(task, episodes[i * group_size : (i + 1) * group_size]) for i, task in enumerate(tasks)]


def resample(plan: Plan, engine: Engine, episodes: Sequence[Episode], times: int, *, stop: Stop = lambda: None) -> None:
    """Draw `times` other answers of every agent at every turn, for counterfactual baselines, into `Turn.alternatives`."""
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t in range(len(episode.turns))
        for agent in episode.turns[t].completions
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


def _open(plan: Plan, task: int, seed: int, sibling: int = 0) -> _Seat:
    """Start an episode up to its first request."""
    episode = Episode(task=task, seed=seed, agents=(), sibling=sibling)
    env = plan.env.make(plan.split)
    episode.agents = tuple(env.possible_agents)
    play = PROTOCOLS[plan.protocol](env, episode, history=plan.history, max_turns=plan.max_turns)
    seat = _Seat(episode, play, [], time.monotonic())
    _resume(seat, None)
    return seat


def _resume(seat: _Seat, completions: list[Completion] | None) -> None:
    """Hand a seat its completions and note what it asks for next; nothing, once its episode is over."""
    try:
        seat.requests = next(seat.play) if completions is None else seat.play.send(completions)
    except StopIteration:
        seat.requests = []
        seat.episode.seconds = time.monotonic() - seat.started


def _stamped(plan: Plan, seat: _Seat) -> list[Request]:
    """The seat's requests with sampling and seed. Every sibling and every branch of a tree has random numbers of its own."""
    episode = seat.episode
    keys = (episode.seed, episode.sibling, ".".join(map(str, episode.path)), len(episode.turns))
    return [replace(r, sampling=plan.sampling_of(r.agent), seed=seeds.derive(*keys, r.agent)) for r in seat.requests]


def _advance(plan: Plan, engine: Engine, seats: Sequence[_Seat], stop: Stop) -> None:
    """Play one turn of every seat with one engine call."""
    stop()
    asked = [_stamped(plan, seat) for seat in seats]
    answers = iter(engine.generate([request for requests in asked for request in requests]))
    for seat, requests in zip(seats, asked, strict=True):
        _resume(seat, [next(answers) for _ in requests])


def _grow(plan: Plan, engine: Engine, roots: Sequence[_Seat], stop: Stop) -> list[list[Episode]]:
    """Grow each root into a turn tree: at every node, every turn, `branches` joint answers. Returns the leaves per root.

    A node's first child goes on in the node's own world; each further child replays the recorded answers in a fresh one.
    """
    trees: list[list[_Seat]] = [[root] for root in roots]
    for depth in range(1 << 30):
        nodes = [(tree, seat) for tree in trees for seat in tree if seat.requests]
        if not nodes:
            return [[seat.episode for seat in tree] for tree in trees]
        frontier = []
        for tree, seat in nodes:
            parent = seat.episode.path
            for child in range(plan.branches):
                branch = seat if child == 0 else _replay(plan, seat.episode, depth)
                branch.episode.path = (*parent, child)
                if child:
                    tree.append(branch)
                frontier.append(branch)
        _advance(plan, engine, frontier, stop)
    raise AssertionError("unreachable")


def _replay(plan: Plan, parent: Episode, depth: int) -> _Seat:
    """A fresh world brought to where `parent` stands by its recorded answers; its turns so far belong to the parent."""
    seat = _open(plan, parent.task, parent.seed)
    for turn in parent.turns[:depth]:
        _resume(seat, [turn.completions[request.agent] for request in seat.requests])
    seat.episode.own_from = depth
    return seat
