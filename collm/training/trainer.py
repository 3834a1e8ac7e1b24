"""The one trainer: collect, learn, evaluate, save, in every iteration."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from collm.engines.base import Engine
from collm.errors import ConfigError
from collm.learning.learner import Learner
from collm.models.team import Team
from collm.rollout.collector import Collector, begin_play
from collm.runs import checkpoint
from collm.runs.alarms import PREFIX, Alarms, answer_metrics, sentence
from collm.runs.directory import begin, checkpoints, lock, resumed_config, write_config
from collm.runs.examples import recorded_examples, write_examples
from collm.runs.heap import HEAP
from collm.runs.log import EPISODES_SAVED, RunLog, describe
from collm.settings.rooms import Config
from collm.training.assemble import assemble, prepare, unfiltered
from collm.training.display import Display
from collm.training.evaluate import evaluate
from collm.training.signals import Interrupted, Signals
from collm.training.task import drawn
from collm.types import Group


class Trainer:
    """Trains a team under a config and writes a run directory.

    Example: Trainer(load_config(Path("recipes/tiny/agree.toml"))).run()
    `team`, `engine`, `collector` and `learner` replace those of the config. `resume` continues a run directory exactly.
    """

    def __init__(
        self,
        config: Config,
        *,
        team: Team | None = None,
        engine: Engine | None = None,
        collector: Collector | None = None,
        learner: Learner | None = None,
        quiet: bool = False,
    ):
        self._setup(config, {"team": team, "engine": engine, "collector": collector, "learner": learner}, quiet)
        self.folder = Path(config.run.folder) / config.run_name
        begin(self.folder, self.config)

    @classmethod
    def resume(cls, folder: Path, *, overrides: Mapping[str, Any] | None = None, quiet: bool = False, **replaced: Any) -> Self:
        """Continue a run from its last checkpoint, or from its start if it has none. Raises ConfigError as `resumed_config`.

        Args:
            overrides: new values of `RESUMABLE` settings, which are written to the run directory.
            replaced: team, engine, collector or learner, as for a new run.
        """
        trainer = cls.__new__(cls)
        given = {"examples": recorded_examples(folder), **replaced}
        trainer._setup(resumed_config(folder, overrides or {}), given, quiet)
        trainer.folder, trainer.changed = folder, bool(overrides)
        return trainer

    def _setup(self, config: Config, given: Mapping[str, Any], quiet: bool) -> None:
        self.config, self.quiet, self.signals = prepare(config), quiet, Signals()
        made = assemble(self.config, **given, stop=self.signals.check)
        self.team, self.engine, self.collector, self.learner = made.team, made.engine, made.collector, made.learner
        self.plan, self.tasks, self.rates = made.plan, made.tasks, made.rates
        self.iteration = self.joint_actions = 0
        self.best: tuple[float, int] | None = None
        self.ahead: list[Group] | None = None  # those of the next iteration, with rollout.ahead
        self.pending: dict[str, Any] | None = {"iteration": 0, "joint_actions": 0, **unfiltered(made.team, made.plan.sampling)}
        self.changed, self.pace, self.whole = False, checkpoint.Pace(), True  # not whole during an update

    def run(self) -> Path:
        """Train to the last iteration and return the run directory.

        Raises Interrupted after a signal. Everything done so far is saved then, except by an interrupted update, which leaves
        the last checkpoint as it was; a resumed run is the same in both cases.
        """
        with lock(self.folder), self.signals.listen(None if self.quiet else self.folder):
            self._restore()
            write_examples(self.folder, self.plan.examples)
            if self.changed:
                write_config(self.folder, self.config)
            settings, every = self.config.run, self.config.evaluation.every
            log = RunLog(self.folder, trackers=settings.trackers, resumed_at=self.iteration, pending=bool(self.pending))
            self.alarms = Alarms(log.before)
            display = Display(settings.iterations, done=self.iteration, evaluate_every=every, quiet=self.quiet)
            display.say("learning rates: " + ", ".join(f"{name} {rate:g}" for name, rate in self.rates.items()))
            try:
                if self.pending is not None:
                    self._complete(self.pending, log, display)
                while self.iteration < self.config.run.iterations:
                    self._iterate(log, display)
                self._save(log)
                checkpoint.save_team(self.folder / "final", self.team, self.plan.examples)
            except Interrupted:
                if self.whole:
                    self._save(log)
                raise
            finally:
                display.close()
                log.close()
        return self.folder

    def _iterate(self, log: RunLog, display: Display) -> None:
        """One iteration: collect episodes, update, and evaluate and save if due."""
        started, number = time.monotonic(), self.iteration + 1
        with display.phase("collecting", self.engine, of=number), self.signals.at_once():
            groups = self.collect() if self.ahead is None else self.ahead
            later: Callable[[], list[Group]] | None = None
            if self.config.rollout.ahead and number < self.config.run.iterations:
                self.engine.rest()
                later = begin_play(self.collector, self.plan, *drawn(self.config, number, self.tasks), number)
        self.engine.rest()
        collected = time.monotonic()
        with display.phase("learning", of=number), self.signals.at_once():
            self.whole = False
            update = self.learner.update(groups, self.iteration)
            learned = time.monotonic()
            self.ahead = later() if later else None
            waited = time.monotonic() - learned
        self.engine.load(self.team)
        HEAP.iterated()
        episodes = [episode for group in groups for episode in group.episodes]
        self.joint_actions += sum(len(episode.turns) - episode.own_from for episode in episodes)
        self.iteration, self.whole = number, True
        record = {"iteration": number, "joint_actions": self.joint_actions, **describe(episodes), **update.metrics}
        record |= answer_metrics(episodes, self.plan.env.make("train"))
        record |= {"seconds/collect": collected - started + waited, "seconds/learn": time.monotonic() - collected - waited}
        log.episodes(number, episodes[:EPISODES_SAVED], update.annotations)
        self._complete(record, log, display)

    def _complete(self, record: dict[str, Any], log: RunLog, display: Display) -> None:
        """Evaluate if due, then write the iteration's record to metrics.jsonl.

        Until then the record is pending: a run that is interrupted here saves it in its checkpoint and completes it on resume.
        """
        self._watch(record, display)
        self.pending = record
        last = self.iteration == self.config.run.iterations
        if self.config.evaluation.due(self.iteration, self.config.run.iterations):
            record = record | self._evaluate(log, display)
            self._watch(record, display)
        log.metrics(record)
        self.pending = None
        display.update(self.iteration, record)
        new_best = (self.best or (0.0, 0))[1] == self.iteration
        due = last or new_best or self.pace.due or self.iteration % self.config.run.checkpoint_every == 0
        if self.iteration and due:
            self._save(log)

    def collect(self) -> list[Group]:
        """Play this iteration's tasks; tasks and random numbers are a function of the seed and the iteration."""
        return self.collector.play(self.plan, *drawn(self.config, self.iteration, self.tasks), self.iteration)

    def _evaluate(self, log: RunLog, display: Display) -> dict[str, Any]:
        """Held-out means now; the best iteration is recorded so that its checkpoint is kept."""
        try:
            with display.phase("evaluating", self.engine), self.signals.at_once():
                result = evaluate(self.config, self.collector, examples=self.plan.examples)
        finally:
            self.engine.rest()  # drop its caches, so that training continues as it would after a resume
        log.episodes(self.iteration, result.episodes, suffix="-evaluation")
        record = result.summary()
        score = record["evaluation/reward"]
        if math.isfinite(score) and (self.best is None or score > self.best[0]):
            self.best = (score, self.iteration)
        display.say(f"held-out after {self.iteration} iterations: reward {score:.3f} over {len(result.played)} tasks")
        return record

    def _watch(self, record: dict[str, Any], display: Display) -> None:
        """Show the alarms that a record raises for the first time, and add them to it."""
        for name, value in self.alarms.raised(record).items():
            record[PREFIX + name] = value
            display.say(f"warning: {sentence(name, value)}")

    def _save(self, log: RunLog) -> None:
        log.flush()
        best, name = self.best and list(self.best), f"{self.iteration:06d}"
        state = {"iteration": self.iteration, "joint_actions": self.joint_actions, "best": best, "pending": self.pending}
        with self.pace.measure():
            checkpoint.save(self.folder / "checkpoints" / name, self.learner, state, self.ahead)
            checkpoint.prune(self.folder, self.best and self.best[1])

    def _restore(self) -> None:
        if found := checkpoints(self.folder):
            state = checkpoint.load(found[-1], self.learner)
            if state["iteration"] > self.config.run.iterations:
                raise ConfigError(
                    f"run.iterations={self.config.run.iterations}, but {state['iteration']} iterations are done. Give as many "
                    "or more."
                )
            self.iteration, self.joint_actions = state["iteration"], state["joint_actions"]
            self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
            self.pending, self.ahead = state["pending"], state["ahead"]
            self.engine.load(self.team)
