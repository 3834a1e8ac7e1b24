"""Replays of recorded answers: turn trees, resampled answers, no-op counterfactuals and branches of recorded episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from collm import seeds
from collm.engines.base import Engine
from collm.envs import gate
from collm.errors import EnvError
from collm.rollout.live import LiveEpisode, Stop, advance, begin, each, live_episode, resume, waits
from collm.rollout.plan import Plan
from collm.types import Completion, Counterfactual, Episode, Request, Turn, outcome


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
    wanted = [
        (episode, t, agent)
        for episode in episodes
        if not episode.failure
        for t in range(len(episode.turns))
        for agent in episode.turns[t].completions
        if plan.agents is None or agent in plan.agents
    ]
    stop()
    for (episode, t, agent), answers in zip(wanted, other_answers(plan, engine, wanted, plan.resamples), strict=True):
        episode.turns[t].alternatives[agent] = answers
        for completion in answers:
            if completion.finish_reason == "error":
                episode.failure = f"{agent}, turn {t}, another answer: {completion.error}"


def other_answers(
    plan: Plan, engine: Engine, wanted: Sequence[tuple[Episode, int, str]], times: int, purpose: str = "alternative"
) -> list[list[Completion]]:
    """For each (episode, turn, agent): `times` answers drawn from the same history, with one engine call.

    purpose: a key of the random numbers; other purposes draw other answers.
    """
    requests = []
    for episode, t, agent in wanted:
        before = replace(episode, turns=episode.turns[:t], observations=episode.turns[t].observations)
        messages = before.history(agent, plan.history)
        for number in range(times):
            seed = seeds.derive(episode.seed, episode.sibling, purpose, number, t, agent)
            requests.append(Request(agent, messages, plan.sampling_of(agent), seed))
    answers = engine.generate(requests)
    return [answers[i * times : (i + 1) * times] for i in range(len(wanted))]


def replay_without(plan: Plan, episodes: Sequence[Episode], *, stop: Stop = lambda: None) -> None:
    """Replay each turn with the answer of one of `plan.agents` empty and the others' as recorded, into `Turn.no_op`.

    New environments replay the recorded answers; nothing is generated. Turns in which an agent acts alone are left out. If the
    environment fails in a replay, that counterfactual is left out. If what it shows before a turn is not what was recorded
    (observations, metrics, rewards), `Counterfactual.matches` is false: its randomness is not determined by the seed.
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
                matches = matches and (past is turn or reward == past.reward)
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


@dataclass(frozen=True, slots=True)
class Branch:
    """A recorded episode up to a turn, which is taken with other answers of some agents.

    Example: Branch(episode, 2, {"agent_0": completion}, plays=range(16))
    """

    episode: Episode
    turn: int
    answers: Mapping[str, Completion]
    """Agent -> the answer taken at this turn instead of the recorded one."""
    plays: Sequence[int] = (0,)
    """Numbers of the plays to the end; each number has its own random numbers, the same in all branches of a turn."""


MISMATCH = "the replay differs from the recorded episode"


def play_on(plan: Plan, engine: Engine, branches: Sequence[Branch], *, stop: Stop = lambda: None) -> list[list[Episode]]:
    """Play each branch to its end, once for each of its `plays`. Returns their episodes, whose `own_from` is the branch's turn.

    New environments replay the recorded answers before the turn; the turn is taken with the branch's answers and the recorded
    ones of the other agents; `engine` answers from then on. All branches are played together, with one engine call per round.
    A branch whose episode ends in its turn has one episode, since nothing is left to sample. A branch has no episode if what
    agents read, or a reward, before the turn differs from the record: the environment has randomness besides its seed.
    """
    plan.check_decentralized()
    lives = [[_branched(plan, branch, branch.plays[0])] for branch in branches]
    each(_retrace, [own[0] for own in lives], branches)
    more = [
        (_branched(plan, branch, play), branch, own)
        for branch, own in zip(branches, lives, strict=True)
        if own[0].requests
        for play in branch.plays[1:]
    ]
    each(_retrace, [live for live, _, _ in more], [branch for _, branch, _ in more])
    for live, _, own in more:
        own.append(live)
    kept = [own if all(live.episode.failure != MISMATCH for live in own) else [] for own in lives]
    while waiting := [live for own in kept for live in own if live.requests]:
        advance(plan, engine, waiting, stop)
    return [[live.episode for live in own] for own in kept]


def replay_with(plan: Plan, branches: Sequence[Branch]) -> list[Episode | None]:
    """Replay each branch to its end with the recorded answers, later ones as well; nothing is generated.

    An agent without a recorded answer gives an empty one; after the recorded number of turns the episode is truncated.
    Returns None where `play_on` has no episode.
    """
    plan.check_decentralized()
    lives = [_branched(plan, branch, 0) for branch in branches]

    def replay(live: LiveEpisode, branch: Branch) -> None:
        _retrace(live, branch)
        for turn in branch.episode.turns[branch.turn + 1 :]:
            if live.requests:
                given = turn.completions
                resume(live, [given.get(r.agent, Completion(r.agent, "")) for r in live.requests])
        live.episode.truncated |= bool(live.requests)

    each(replay, lives, branches)
    return [None if live.episode.failure == MISMATCH else live.episode for live in lives]


def _branched(plan: Plan, branch: Branch, play: int) -> LiveEpisode:
    """A new episode for one play of a branch; its sibling's number stands for its random numbers."""
    recorded = branch.episode
    path = ".".join(map(str, recorded.path))
    live = live_episode(plan, recorded.task, recorded.seed, seeds.derive(recorded.sibling, path, "branch", branch.turn, play))
    live.episode.own_from = branch.turn
    return live


def _retrace(live: LiveEpisode, branch: Branch) -> None:
    """Replay the recorded answers before the branch's turn and take that turn. Where the replay differs from the record, the
    episode fails as a `MISMATCH`."""
    begin(live)
    for t, recorded in enumerate(branch.episode.turns[: branch.turn + 1]):
        given = recorded.completions | dict(branch.answers) if t == branch.turn else recorded.completions
        acting = [request.agent for request in live.requests]
        read = {agent: live.episode.observations[agent] for agent in acting}
        rewards = [turn.reward for turn in live.episode.turns]
        if read != recorded.observations or rewards != [turn.reward for turn in branch.episode.turns[:t]]:
            live.episode.failure, live.requests = MISMATCH, []
            return
        resume(live, [given[agent] for agent in acting])
