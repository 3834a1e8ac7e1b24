"""The one driver: plays any number of episodes together, under any protocol, with one engine call per round of requests.

Training, evaluation and untrained baselines all go through `collect`.
"""

from __future__ import annotations

from collections.abc import Sequence

from collm.engines.base import Engine
from collm.rollout.live import Stop, advance, begin, each, live_episode
from collm.rollout.plan import Plan
from collm.rollout.replay import grow
from collm.types import Group


def collect(
    plan: Plan, engine: Engine, tasks: Sequence[int], group_seeds: Sequence[int], *, stop: Stop = lambda: None
) -> list[Group]:
    """Play a group of `plan.group_size` episodes, or one turn tree, of each of `tasks`.

    The episodes of a group share the environment's seed. The random numbers of an answer depend on that seed, the sibling, the
    agent and the turn alone, so the result does not depend on the other episodes that are played at the same time.
    Environments whose class has `waits = True` (they wait for a sandbox or a server) are reset and stepped in threads, with the
    same results.

    Args: group_seeds: one seed per task. stop: called between engine calls; raises to leave early.
    """
    if plan.tree:
        plan.check_decentralized()
        roots = [live_episode(plan, task, seed) for task, seed in zip(tasks, group_seeds, strict=True)]
        each(begin, roots)
        trees = grow(plan, engine, roots, stop)
        return [Group(task, leaves) for task, leaves in zip(tasks, trees, strict=True)]
    size = plan.group_size
    lives = [
        live_episode(plan, task, seed, sibling)
        for task, seed in zip(tasks, group_seeds, strict=True)
        for sibling in range(size)
    ]
    each(begin, lives)
    while waiting := [live for live in lives if live.requests]:
        advance(plan, engine, waiting, stop)
    episodes = [live.episode for live in lives]
    return [Group(task, episodes[i * size : (i + 1) * size]) for i, task in enumerate(tasks)]
