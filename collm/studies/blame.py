"""`collm blame`: whose answer, at which turn, cost the failed episodes of a run most."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.errors import ConfigError
from collm.runs.directory import run_config
from collm.runs.examples import recorded_examples
from collm.runs.open import Run, open_run
from collm.runs.read import Record, recorded_episode
from collm.settings.rooms import Config
from collm.types import Completion, Episode

if TYPE_CHECKING:
    from collm.rollout.plan import Plan

CREDIT, NO_OP, RESAMPLING = "credit", "no-op", "resampling"
OWN_MEDIAN = 4
"""A task with as many recorded episodes has a median of its own."""
Costs = dict[tuple[int, str], float]
"""(turn, agent) -> return that the answer cost."""


@dataclass(frozen=True, slots=True)
class Fault:
    """The answer that cost an episode most. Example: Fault("builder_1", turn=2, cost=0.4, text="/setblock 0 0 0 stone")"""

    agent: str
    turn: int
    """Counted from 0."""
    cost: float
    """In units of return; by credit in those of the run's advantages."""
    text: str

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON; turns count from 1."""
        return {"agent": self.agent, "turn": self.turn + 1, "cost": self.cost, "text": self.text}


@dataclass(frozen=True, slots=True)
class Blamed:
    """One failed episode with the answer that each method blames."""

    iteration: int
    task: str
    total: float
    """Its return: the sum of joint rewards."""
    faults: Mapping[str, Fault]
    """"credit", "no-op" or "resampling" -> the answer that cost most; a method that knows nothing of the episode is absent."""

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        faults = {method: fault.plain() for method, fault in self.faults.items()}
        return {"iteration": self.iteration, "task": self.task, "return": self.total, "blamed": faults}


@dataclass(frozen=True, slots=True)
class Blame:
    """The failed episodes of a run. Example: blame("runs/demo").episodes[0].faults["credit"].agent"""

    episodes: Sequence[Blamed]
    num_read: int
    """Recorded training episodes that were considered."""
    mismatches: int
    """Failed episodes whose replay differs from the record, so that no-op replay and resampling know nothing of them."""

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        shown = [blamed.plain() for blamed in self.episodes]
        return {"episodes": shown, "considered": self.num_read, "mismatches": self.mismatches}


def blame(
    run: Run | str | Path,
    *,
    below: float | None = None,
    last: int = 10,
    replay: bool = True,
    resamples: int = 0,
    overrides: Mapping[str, Any] | None = None,
) -> Blame:
    """For each failed episode of a run, the answer that cost most, by up to three methods.

    "credit": the smallest advantage that the learner recorded. "no-op": the return rises most if the answer is empty and all
    other answers, later ones as well, stay as recorded. "resampling": `rollout.truth.truths` is smallest, with the run's final
    team. Returns are sums of joint rewards.

    Args:
        below: an episode has failed if its return is below this; default: below the median of its task, or of all episodes
            considered if the task has fewer than four of them.
        last: the last recorded training iterations to consider.
        replay: whether the environment is made for no-op replay. resamples: K of `truths`; 0: no resampling.
        overrides: `{"room.key": value}`, as in `collm evaluate`.
    Raises: RunError or ConfigError.
    """
    run = run if isinstance(run, Run) else open_run(run)
    if last < 1 or resamples == 1 or resamples < 0:
        raise ConfigError(f"last={last}, resamples={resamples}: give 1 or more iterations, and no or 2 or more resamples.")
    config = run_config(run.folder, overrides or {}) if replay else None
    wanted = list(run.training_episodes())[-last:]
    records = [record for iteration in wanted for record in run.episodes(iteration)]
    poor = failed(records, below)
    examples = recorded_examples(run.folder)
    episodes = [recorded_episode(record, examples) for record in poor]
    found: dict[str, list[Costs | None]] = {CREDIT: [credit_costs(record) for record in poor]}
    if config is not None and episodes:
        found |= _replayed(run, config, episodes, resamples)
    blamed = []
    for number, record in enumerate(poor):
        costs = {method: own[number] for method, own in found.items()}
        faults = {method: worst(record, own) for method, own in costs.items() if own}
        blamed.append(Blamed(record["iteration"], record["label"] or str(record["task"]), total(record), faults))
    return Blame(blamed, len(records), sum(costs is None for costs in found.get(NO_OP, ())))


def failed(records: Sequence[Record], below: float | None = None) -> list[Record]:
    """The episodes whose return is below `below`, or below the median as in `blame`."""
    played = [record for record in records if not record["failure"] and record["turns"]]
    by_task: dict[Any, list[float]] = {}
    for record in played:
        by_task.setdefault(record["task"], []).append(total(record))
    everything = [total(record) for record in played]
    medians = {t: statistics.median(own if len(own) >= OWN_MEDIAN else everything) for t, own in by_task.items()}
    return [record for record in played if total(record) < (medians[record["task"]] if below is None else below)]


def total(record: Record) -> float:
    """The return of a recorded episode: the sum of its joint rewards."""
    return float(sum(turn.get("reward") or 0.0 for turn in record["turns"]))


def by_credit(record: Record) -> Fault | None:
    """The answer with the smallest recorded advantage; None without recorded advantages."""
    costs = credit_costs(record)
    return worst(record, costs) if costs else None


def credit_costs(record: Record) -> Costs:
    """Minus the recorded advantages of an episode's answers."""
    return {
        (t, agent): -said["advantage"]
        for t, turn in enumerate(record["turns"])
        for agent, said in turn["agents"].items()
        if "advantage" in said.get("learned", "").split()
    }


def worst(record: Record, costs: Costs) -> Fault:
    """The answer with the greatest cost; of equal ones the first."""
    turn, agent = max(costs, key=lambda place: costs[place])
    return Fault(agent, turn, costs[turn, agent], record["turns"][turn]["agents"][agent]["wrote"])


def no_op_costs(plan: Plan, episode: Episode) -> Costs | None:
    """For each answer: return with it empty and all others as recorded, minus the recorded return; answers whose replay fails
    are left out. None if the recorded episode cannot be replayed."""
    from collm.rollout.replay import Branch, replay_with

    places = [(t, agent) for t, turn in enumerate(episode.turns) for agent in turn.completions]
    branches = [Branch(episode, t, {agent: Completion(agent, "")}) for t, agent in places]
    whole, *empty = replay_with(plan, [Branch(episode, len(episode.turns) - 1, {}), *branches])
    recorded = [turn.reward for turn in episode.turns]
    if whole is None or [turn.reward for turn in whole.turns] != recorded:
        return None
    return {
        place: sum(turn.reward for turn in replayed.turns) - sum(recorded)
        for place, replayed in zip(places, empty, strict=True)
        if replayed is not None and not replayed.failure
    }


def _replayed(run: Run, config: Config, episodes: Sequence[Episode], resamples: int) -> dict[str, list[Costs | None]]:
    """Costs by no-op replay, and with `resamples` by resampling."""
    from collm.training.task import plan_of

    plan = plan_of(config, "train")
    found: dict[str, list[Costs | None]] = {NO_OP: [no_op_costs(plan, episode) for episode in episodes]}
    if not resamples:
        return found
    from collm.engines.catalogue import make_engine
    from collm.rollout.truth import truths
    from collm.training.assemble import with_remote

    places = [(e, t, agent) for e, own in enumerate(episodes) for t, turn in enumerate(own.turns) for agent in turn.completions]
    engine = with_remote(make_engine(run.team(), config.rollout), config)
    try:
        known = truths(plan, engine, [(episodes[e], t, agent) for e, t, agent in places], resamples, gamma=1.0)
    finally:
        engine.close()
    costs: list[Costs | None] = [{} for _ in episodes]
    for (e, t, agent), truth in zip(places, known, strict=True):
        own = costs[e]
        if own is not None and not truth.unknown:
            own[t, agent] = -truth.mean
    return found | {RESAMPLING: costs}
