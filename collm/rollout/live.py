"""Episodes in progress: each is a protocol's generator with its open requests."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from collm import seeds
from collm.engines.base import Engine
from collm.machine import usable_cores
from collm.rollout.plan import Plan
from collm.rollout.protocols import PROTOCOLS, Play
from collm.types import Completion, Episode, Request, examples_of

THREADS = max(4, min(32, 2 * usable_cores()))
"""Number of threads for environments that wait for a sandbox or a server."""
Stop = Callable[[], None]
"""Called between engine calls; raises to leave early."""


@dataclass(slots=True)
class LiveEpisode:
    """One episode in progress."""

    episode: Episode
    play: Play
    """The protocol's generator."""
    requests: list[Request]
    """Open requests; empty once the episode is over."""
    started: float
    """`time.monotonic()` at its creation, in seconds."""
    waits: bool
    """Its environment waits for a sandbox or a server, so that it is stepped in a thread."""


def live_episode(plan: Plan, task: int, seed: int, sibling: int = 0, *, env: Any = None) -> LiveEpisode:
    """Create an episode, not yet begun. env: played instead of a new environment."""
    episode = Episode(task=task, seed=seed, agents=(), sibling=sibling)
    env = plan.env.make(plan.split) if env is None else env
    episode.agents = tuple(env.possible_agents)
    if plan.examples:
        episode.examples = {agent: examples_of(plan.examples, agent) for agent in episode.agents}
    play = PROTOCOLS[plan.protocol](env, episode, history=plan.history, max_turns=plan.max_turns)
    return LiveEpisode(episode, play, [], time.monotonic(), waits(env))


def begin(live: LiveEpisode) -> None:
    """Play up to the first request."""
    resume(live, None)


def resume(live: LiveEpisode, completions: list[Completion] | None) -> None:
    """Send completions to a live episode and store its next requests; none if the episode is over."""
    try:
        live.requests = next(live.play) if completions is None else live.play.send(completions)
    except StopIteration:
        live.requests = []
        live.episode.seconds = time.monotonic() - live.started


def waits(env: Any) -> bool:
    return bool(getattr(env, "waits", False))


def each(call: Callable[..., None], items: Sequence[Any], *arguments: Sequence[Any], waiting: bool | None = None) -> None:
    """Call `call` for each item: one after the other, or in threads if environments wait.

    waiting: use threads; default: `waits` of the first item, a live episode. If several calls raise, the first item's error is
    raised.
    """
    if len(items) > 1 and (items[0].waits if waiting is None else waiting):
        with ThreadPoolExecutor(min(THREADS, len(items)), thread_name_prefix="collm-env") as pool:
            for _ in pool.map(call, items, *arguments):
                pass
        return
    for row in zip(items, *arguments, strict=True):
        call(*row)


def _stamped(plan: Plan, live: LiveEpisode) -> list[Request]:
    """The requests of a live episode with sampling and seed. Seeds differ between siblings and between branches of a tree."""
    episode = live.episode
    keys = (episode.seed, episode.sibling, ".".join(map(str, episode.path)), len(episode.turns))

    def stamped(request: Request) -> Request:
        kind = () if request.kind == "answer" else (request.kind,)
        seed = seeds.derive(*keys, request.agent, *kind)
        return replace(request, sampling=plan.sampling_of(request.agent), seed=seed)

    return [stamped(request) for request in live.requests]


def advance(plan: Plan, engine: Engine, lives: Sequence[LiveEpisode], stop: Stop) -> None:
    """Answer the requests of all live episodes with one engine call, and resume the episodes."""
    stop()
    asked = [_stamped(plan, live) for live in lives]
    answers = iter(engine.generate([request for requests in asked for request in requests]))
    each(resume, lives, [[next(answers) for _ in requests] for requests in asked])
