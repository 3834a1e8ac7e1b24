"""Measures what an algorithm's advantages have in common with counterfactual truth, at one state of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from collm import seeds
from collm.errors import ConfigError
from collm.learning.learner import Annotations
from collm.rollout.live import Stop
from collm.rollout.replay import MISMATCH
from collm.rollout.truth import truths
from collm.runs import checkpoint
from collm.runs.directory import CODE, check_named, read_settings, run_config
from collm.runs.fidelity import FIDELITY, Evidence, Judged, write_evidence
from collm.runs.log import RunLog
from collm.runs.weights import find_weights
from collm.settings.rooms import Config
from collm.training.assemble import Assembly, assemble, prepare
from collm.training.display import Display
from collm.training.task import draw_tasks
from collm.training.trainer import Trainer
from collm.types import Episode

PLAYS = 16
"""Plays after the given answer, and other answers, of one counterfactual truth."""
PER_EPISODE = 4
"""About as many answers are judged per episode; more episodes are played for more answers."""


def restored(folder: Path, which: str, overrides: Mapping[str, Any]) -> tuple[Config, Assembly, int]:
    """The objects of a run as they were at a checkpoint (weights, critics, regressions, optimizers), and its iterations done.

    which: "best", "start" or the number of a kept checkpoint. overrides: as in `run_config`. Raises RunError or ConfigError.
    """
    if which == "final":
        raise ConfigError("checkpoint='final' holds no critic. Name a number of iterations, 'best' or 'start'.")
    weights, _ = find_weights(folder, which)
    check_named(folder, read_settings(folder), overrides, training=True)
    kept = {name: value for name, value in overrides.items() if name not in CODE}
    config = prepare(run_config(folder, kept))
    made = assemble(config)
    if weights is not None:
        checkpoint.load(weights, made.learner)
        made.engine.load(made.team)
    return config, made, 0 if weights is None else int(weights.name)


def measure(
    made: Assembly, config: Config, iteration: int, *, answers: int, plays: int = PLAYS, stop: Stop = lambda: None
) -> Evidence:
    """Play training episodes, assign credit without learning, and judge `answers` of their answers, as many of each turn.

    Every batch has the size of an iteration's, since advantages may be normalized over it. Nothing is changed.
    """
    if answers < 1 or plays < 2:
        raise ConfigError(f"answers={answers}, plays={plays}: judge 1 or more answers with 2 or more plays each.")
    seed, tasks = config.run.seed, config.rollout.tasks
    episodes: list[Episode] = []
    credit: dict[tuple[int, int, str], float] = {}
    batch = 0
    while not batch or PER_EPISODE * len(episodes) < answers:
        keys = [seeds.derive(seed, "fidelity", iteration, batch, i) for i in range(tasks)]
        groups = made.collector.play(made.plan, draw_tasks(seed, iteration + batch, tasks, made.tasks), keys, iteration)
        credit |= _advantages(made.learner.credit(groups), len(episodes))
        episodes += [episode for group in groups for episode in group.episodes]
        batch += 1
    chosen = _spread(list(credit), answers, seed)
    found = truths(
        made.plan,
        made.engine,
        [(episodes[e], t, agent) for e, t, agent in chosen],
        plays,
        gamma=config.algorithm.gamma,
        stop=stop,
    )
    made.engine.rest()
    known = [(place, truth) for place, truth in zip(chosen, found, strict=True) if not truth.unknown]
    mismatches = sum(truth.unknown == MISMATCH for truth in found)
    judged = tuple(Judged(*place, credit[place], truth.differences_K) for place, truth in known)
    return Evidence(iteration, judged, mismatches, len(found) - len(known) - mismatches)


def _advantages(annotations: Annotations, first: int) -> dict[tuple[int, int, str], float]:
    """(episode's index, from `first` on; turn; agent) -> advantage."""
    return {
        (first + e, t, agent): said.advantage
        for e, answers in annotations.items()
        for (t, agent), said in answers.items()
        if said.advantage is not None and math.isfinite(said.advantage)
    }


def _spread(places: list[tuple[int, int, str]], count: int, seed: int) -> list[tuple[int, int, str]]:
    """At most `count` (episode, turn, agent), drawn without replacement, equally many of each turn where there are enough."""
    seeds.stream(seed, "judged answers").shuffle(places)
    seen: dict[int, int] = {}
    ranked = []
    for place in places:
        seen[place[1]] = seen.get(place[1], 0) + 1
        ranked.append((seen[place[1]], place))
    return [place for _, place in sorted(ranked, key=lambda item: item[0])[:count]]


class JudgedTrainer(Trainer):
    """A trainer that also judges `judged` answers once, at half of its training, and writes `fidelity.json`.

    Training is the same as without. The measurement is made while the iteration's record is pending, so that a run that is
    interrupted in it makes it again on resume; its seconds count as neither collecting nor learning.
    """

    judged: int = 0

    def _complete(self, record: dict[str, Any], log: RunLog, display: Display) -> None:
        half = self.config.run.iterations // 2
        if self.judged and self.iteration >= half and not (self.folder / FIDELITY).exists():
            self.pending = record
            made = Assembly(self.team, self.engine, self.collector, self.learner, self.plan, self.tasks, self.rates)
            with self.signals.at_once():
                evidence = measure(made, self.config, self.iteration, answers=self.judged, stop=self.signals.check)
            write_evidence(self.folder, evidence)
        super()._complete(record, log, display)
