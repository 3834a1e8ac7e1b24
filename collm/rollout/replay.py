"""Replays of recorded answers: turn trees, resampled answers and no-op counterfactuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from collm import seeds
from collm.engines.base import Engine
from collm.envs import gate
from collm.errors import EnvError
from collm.rollout.live import LiveEpisode, Stop, advance, begin, each, live_episode, resume, waits
from collm.rollout.plan import Plan
from collm.types import Counterfactual, Episode, Request, Turn, outcome


def grow(plan: Plan, engine: Engine, roots: Sequence[LiveEpisode], stop: Stop) -> list[list[Episode]]:
    """Grow each root into a turn tree with `group_size` joint answers at every node. Returns the leaves of each root.

    A node's first child continues in the node's environment; each further child replays the recorded answers in a new one.
    """
    trees: list[list[LiveEpisode]] = [[root] for root in roots]
    while True:
        nodes = [(tree, live) for tree in trees for live in tree if live.requests]
        if not nodes:
            return [[live.episode for live in tree] for tree in trees]
        frontier: list[LiveEpisode] = []
        branches: list[LiveEpisode] = []
        replays: list[list[Turn]] = []
        for tree, live in nodes:
            parent = live.episode.path
            for child in range(plan.group_size):
                branch = live if child == 0 else live_episode(plan, live.episode.task, live.episode.seed)
                branch.episode.path = (*parent, child)
                if child:
                    tree.append(branch)
                    branches.append(branch)
                    replays.append(live.episode.turns)
                frontier.append(branch)
        each(_repeat, branches, replays)
        advance(plan, engine, frontier, stop)


def _repeat(live: LiveEpisode, turns: Sequence[Turn]) -> None:
    """Bring a new environment to a sibling's state with the recorded answers; these turns belong to the sibling."""
    begin(live)
    for turn in turns:
        resume(live, [turn.completions[request.agent] for request in live.requests])
    live.episode.own_from = len(turns)


def resample(
    plan: Plan,
    engine: Engine,
    episodes: Sequence[Episode],
    *,
    stop: Stop = lambda: None,
) -> None:
    """Resample `plan.resamples` answers of each of `plan.agents` at every turn, into `Turn.alternatives`."""
    plan.check_decentralized()
    times = plan.resamples
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t in range(len(episode.turns))
        for agent in episode.turns[t].completions
        if plan.agents is None or agent in plan.agents
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


def replay_without(plan: Plan, episodes: Sequence[Episode], *, stop: Stop = lambda: None) -> None:
    """Replay each turn with the answer of one of `plan.agents` empty and the others' as recorded, into `Turn.no_op`.

    New environments replay the recorded answers; nothing is generated. Turns in which an agent acts alone are left out. If the
    environment fails in a replay, that counterfactual is left out. If what it shows before a turn is not what was recorded
    (observations, metrics), `Counterfactual.matches` is false: the environment has randomness that its seed does not determine.
    An episode of T turns and N agents costs N T (T + 1) / 2 environment turns.
    """
    plan.check_decentralized()
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t, turn in enumerate(episode.turns)
        if t >= episode.own_from
        if len(turn.completions) > 1
        for agent in turn.completions
        if plan.agents is None or agent in plan.agents
    ]

    def replay(episode: Episode, t: int, agent: str) -> None:
        stop()
        env = plan.env.make(plan.split)
        turn = episode.turns[t]
        ignored = frozenset(getattr(env, "diagnostics", ()))
        matches, metrics = True, episode.turns[0].metrics
        try:
            observations, _ = gate.reset(env, episode.seed, episode.task)
            for past in episode.turns[: t + 1]:
                matches = matches and _repeats(past, observations, metrics, ignored)
                said = {a: "" if past is turn and a == agent else c.text for a, c in past.completions.items()}
                observations, rewards, _, _, infos = gate.step(env, said)
                reward, raw_reward, info = outcome(said, rewards, infos)
                metrics = dict(info.get("metrics", metrics))
        except EnvError:
            return
        turn.no_op[agent] = Counterfactual(reward, raw_reward, metrics, observations, matches)

    if wanted:
        each(replay, *zip(*wanted, strict=True), waiting=waits(plan.env.make(plan.split)))


def _repeats(turn: Turn, observations: Mapping[str, str], metrics: Mapping[str, Any], ignored: frozenset[str]) -> bool:
    """Whether a replay has come to what was recorded before a turn; observations and metrics are those of the replay."""
    recorded, found = (sorted((k, repr(v)) for k, v in m.items() if k not in ignored) for m in (turn.metrics, metrics))
    return recorded == found and all(observations.get(agent) == text for agent, text in turn.observations.items())
