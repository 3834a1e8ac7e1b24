"""Episodes under way: each is a protocol's generator with the requests that it waits for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from collm import seeds
from collm.engines.base import Engine
from collm.rollout.plan import Plan
from collm.rollout.protocols import PROTOCOLS, Play
from collm.types import Completion, Episode, Request

THREADS = max(4, min(32, 2 * len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2 * (os.cpu_count() or 1)))
"""How many environments that wait are stepped at a time."""
Stop = Callable[[], None]
"""Called between engine calls; raises to leave early."""


@dataclass(slots=True)
class LiveEpisode:
    """One episode under way: its generator and what it asks for. waits: its environment spends its time waiting, not
    computing."""

    episode: Episode
    play: Play
    requests: list[Request]
    started: float
    waits: bool


def live_episode(plan: Plan, task: int, seed: int, sibling: int = 0) -> LiveEpisode:
    """An episode that has not begun, in an environment of its own."""
    episode = Episode(task=task, seed=seed, agents=(), sibling=sibling)
    env = plan.env.make(plan.split)
    episode.agents = tuple(env.possible_agents)
    play = PROTOCOLS[plan.protocol](env, episode, history=plan.history, max_turns=plan.max_turns)
    return LiveEpisode(episode, play, [], time.monotonic(), waits(env))


def begin(live: LiveEpisode) -> None:
    """Play up to the first request."""
    resume(live, None)


def resume(live: LiveEpisode, completions: list[Completion] | None) -> None:
    """Hand a live episode its completions and note what it asks for next; nothing, once its episode is over."""
    try:
        live.requests = next(live.play) if completions is None else live.play.send(completions)
    except StopIteration:
        live.requests = []
        live.episode.seconds = time.monotonic() - live.started


def waits(env: Any) -> bool:
    return bool(getattr(env, "waits", False))


def each(call: Callable[..., None], items: Sequence[Any], *arguments: Sequence[Any], waiting: bool | None = None) -> None:
    """`map`: in turn, or in threads where environments wait; by default as the first item, a live episode, says. Of several
    errors the first item's is raised."""
    if len(items) > 1 and (items[0].waits if waiting is None else waiting):
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="collm-env") as pool:
            for _ in pool.map(call, items, *arguments):
                pass
        return
    for row in zip(items, *arguments, strict=True):
        call(*row)


def _stamped(plan: Plan, live: LiveEpisode) -> list[Request]:
    """The requests of a live episode with sampling and seed. Every sibling and every branch of a tree has random numbers of
    its own."""
    episode = live.episode
    keys = (episode.seed, episode.sibling, ".".join(map(str, episode.path)), len(episode.turns))

    def stamped(request: Request) -> Request:
        kind = () if request.kind == "answer" else (request.kind,)
        seed = seeds.derive(*keys, request.agent, *kind)
        return replace(request, sampling=plan.sampling_of(request.agent), seed=seed)

    return [stamped(request) for request in live.requests]


def advance(plan: Plan, engine: Engine, lives: Sequence[LiveEpisode], stop: Stop) -> None:
    """Answer what every live episode asks for with one engine call, and play on."""
    stop()
    asked = [_stamped(plan, live) for live in lives]
    answers = iter(engine.generate([request for requests in asked for request in requests]))
    each(resume, lives, [[next(answers) for _ in requests] for requests in asked])
