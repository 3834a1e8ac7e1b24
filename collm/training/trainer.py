"""The one trainer: collect, learn, evaluate, save; and do it again. It reads top to bottom."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from collm import seeds
from collm.config import Config, EnvSettings, apply_overrides, parse_resolved
from collm.engines.base import Engine, Resting
from collm.engines.catalogue import make_engine
from collm.envs import gate
from collm.errors import ConfigError
from collm.models.team import Team
from collm.rollout.collect import collect, imagine_silence, resample
from collm.rollout.protocols import PROTOCOLS
from collm.runs import checkpoint
from collm.runs.directory import (
    begin,
    checkpoints,
    ignored,
    lock,
    read_settings,
    usable_cores,
    with_absolute_data,
    write_config,
)
from collm.runs.log import RunLog, describe
from collm.training.assemble import make_learner
from collm.training.display import Display
from collm.training.evaluate import alarms, evaluate, num_tasks, plan_of
from collm.types import Episode, Group

RESUMABLE = ("run.iterations", "run.device", "run.threads")
"""Settings that a run may be resumed with."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything done so far is saved."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Trainer:
    """Trains a team as a config says and keeps a run directory.

    Example: Trainer(load_config(Path("recipes/tiny/agree.toml"))).run()
    `team` and `engine` replace what the config would load. `resume` continues a run directory where it stopped, exactly.
    """

    def __init__(self, config: Config, *, team: Team | None = None, engine: Engine | None = None, quiet: bool = False):
        self._setup(config, team, engine, quiet)
        self.folder = Path(config.run.folder) / config.run_name
        begin(self.folder, self.config)

    @classmethod
    def resume(
        cls,
        folder: Path,
        *,
        overrides: Mapping[str, Any] | None = None,
        team: Team | None = None,
        engine: Engine | None = None,
        quiet: bool = False,
    ) -> Trainer:
        """Continue a run from its last checkpoint (from its start, if it has none yet).

        overrides: new values of `RESUMABLE` settings; the run directory keeps them. Raises ConfigError for any other.
        """
        for name in overrides or {}:
            if name not in RESUMABLE:
                raise ConfigError(
                    f"{name!r} cannot change when a run is resumed: these can: {', '.join(RESUMABLE)}. Start a new run for "
                    "other settings: collm train RECIPE --run.name NAME."
                )
        values = read_settings(folder)
        apply_overrides(values, overrides or {})
        config = parse_resolved(values)
        trainer = cls.__new__(cls)
        trainer._setup(config, team, engine, quiet)
        trainer.folder = folder
        trainer.changed = bool(overrides)
        return trainer

    def _setup(self, config: Config, team: Team | None, engine: Engine | None, quiet: bool) -> None:
        config.check_trains()
        threads = config.run.threads or usable_cores()
        device = resolve_device(config.run.device)
        run = config.run.model_copy(update={"threads": threads, "device": device})
        options = with_absolute_data(config.env.options, Path.cwd())
        env = EnvSettings.model_validate({"name": config.env.name, **options})
        self.config = config.model_copy(update={"run": run, "env": env})
        self.quiet = quiet
        torch.set_num_threads(threads)
        self.plan = plan_of(self.config, "train")
        self.agents = check_fit(self.config)
        self.num_tasks = num_tasks(self.plan)
        if self.config.evaluation.every:
            num_tasks(plan_of(self.config, "eval"))  # what is wrong there is said before anything begins
        self.team = team or make_team(self.config, self.agents)
        if self.team.agents != trained_agents(self.config, self.agents):
            raise ConfigError(f"the team plays {self.team.agents}, but the task's agents are {self.agents}.")
        self.engine = engine or with_remote(make_engine(self.team, config.rollout), self.config)
        if not self.engine.trains:
            raise ConfigError(
                f"{type(self.engine).__name__} gives no token ids and log-probs: it can evaluate and play frozen "
                "team-mates, but not train. Use the local engine."
            )
        names = () if config.algorithm.critic == "none" else metric_names(self.config)
        self.learner = make_learner(self.team, self.config, self.plan.sampling, names)
        self.iteration = 0
        self.joint_actions = 0
        self.best: tuple[float, int] | None = None
        self.pending: dict[str, Any] | None = {"iteration": 0, "joint_actions": 0}
        self.signal: int | None = None
        self.changed = False
        self.warned: set[str] = set()

    def run(self) -> Path:
        """Train to the last iteration and return the run directory.

        Raises Interrupted after a signal, everything done so far saved.
        """
        with lock(self.folder), self._listen():
            self._restore()
            if self.changed:
                write_config(self.folder, self.config)
            log = RunLog(
                self.folder,
                tensorboard=self.config.run.tensorboard,
                resumed_at=self.iteration,
                pending=self.pending is not None,
            )
            display = Display(self.config.run.iterations, done=self.iteration, quiet=self.quiet)
            try:
                if self.pending is not None:
                    self._complete(self.pending, log, display)
                while self.iteration < self.config.run.iterations:
                    self._iterate(log, display)
                self._save(log)
                checkpoint.save_team(self.folder / "final", self.team)
            except Interrupted:
                self._save(log)
                raise
            finally:
                display.close()
                log.close()
        return self.folder

    def _iterate(self, log: RunLog, display: Display) -> None:
        """One iteration: new episodes, one update, sometimes an evaluation and a checkpoint."""
        started = time.monotonic()
        groups = self._collect()
        self._rest()
        collected = time.monotonic()
        update = self.learner.update(groups, self.iteration)
        self.engine.load(self.team)
        self.iteration += 1
        episodes = [episode for group in groups for episode in group.episodes]
        self.joint_actions += sum(len(episode.turns) - episode.own_from for episode in episodes)
        record = {"iteration": self.iteration, "joint_actions": self.joint_actions, **describe(episodes), **update.metrics}
        if self.config.critic.difference:
            imagined = [len(turn.silent) / len(turn.completions) for e in episodes for turn in e.turns[e.own_from :]]
            record["critic/imagined"] = sum(imagined) / max(1, len(imagined))
        record["seconds/collect"] = collected - started
        record["seconds/learn"] = time.monotonic() - collected
        log.episodes(self.iteration, episodes[: self.config.run.episodes_saved], update.annotations)
        self._complete(record, log, display)

    def _complete(self, record: dict[str, Any], log: RunLog, display: Display) -> None:
        """Evaluate where it is due, then write the iteration's line.

        Until then the record is pending: a run interrupted here keeps it in its checkpoint and completes it on resume.
        """
        self.pending = record
        every, last = self.config.evaluation.every, self.iteration == self.config.run.iterations
        if every and (last or self.iteration % every == 0):
            record = record | self._evaluate(log, display)
        log.metrics(record)
        self.pending = None
        display.update(self.iteration, record)
        new_best = self.best is not None and self.best[1] == self.iteration
        if self.iteration and (last or new_best or self.iteration % self.config.run.checkpoint_every == 0):
            self._save(log)

    def _collect(self) -> list[Group]:
        """This iteration's tasks, played; which tasks and which random numbers depend on the iteration's number alone."""
        tasks = draw_tasks(self.config.run.seed, self.iteration, self.config.rollout.tasks, self.num_tasks)
        keys = [seeds.derive(self.config.run.seed, "episode", self.iteration, i) for i in range(len(tasks))]
        size = self.config.algorithm.group_size
        groups = collect(self.plan, self.engine, tasks, keys, group_size=size, stop=self._check_signal)
        episodes = [episode for group in groups for episode in group.episodes]
        if self.config.algorithm.advantage == "counterfactual":
            times = self.config.algorithm.resamples
            resample(self.plan, self.engine, episodes, times, agents=self.team.agents, stop=self._check_signal)
        if self.config.critic.difference:
            imagine_silence(self.plan, episodes, agents=self.team.agents, stop=self._check_signal)
        return groups

    def _rest(self) -> None:
        if isinstance(self.engine, Resting):
            self.engine.rest()

    def _evaluate(self, log: RunLog, display: Display) -> dict[str, Any]:
        """Held-out means of this moment; the best is remembered, so that its checkpoint is kept."""
        try:
            result = evaluate(self.config, self.engine, stop=self._check_signal)
        finally:
            self._rest()  # what it has read leaves training as it is when resumed from here
        log.episodes(self.iteration, result.episodes, suffix="-evaluation")
        record = result.summary()
        score = record["evaluation/reward"]
        if math.isfinite(score) and (self.best is None or score > self.best[0]):
            self.best = (score, self.iteration)
        display.say(f"held-out after {self.iteration} iterations: reward {score:.3f} over {len(result.played)} tasks")
        for name, warning in alarms(record).items():
            if self.iteration and name not in self.warned:  # before training, odd answers are no news
                self.warned.add(name)
                display.say(warning)
        return record

    # --- saving and leaving ------------------------------------------------------------------------------------------

    def _save(self, log: RunLog) -> None:
        log.flush()
        best = None if self.best is None else list(self.best)
        state = {"iteration": self.iteration, "joint_actions": self.joint_actions, "best": best, "pending": self.pending}
        folder = self.folder / "checkpoints"
        checkpoint.save(folder / f"{self.iteration:06d}", self.learner, state)
        checkpoint.prune(self.folder, self.config.run.keep, self.best and self.best[1])

    def _restore(self) -> None:
        found = checkpoints(self.folder)
        if found:
            state = checkpoint.load(found[-1], self.learner)
            if state["iteration"] > self.config.run.iterations:
                raise ConfigError(
                    f"run.iterations={self.config.run.iterations}, but {state['iteration']} iterations are done. Give as many "
                    "or more."
                )
            self.iteration, self.joint_actions = state["iteration"], state["joint_actions"]
            self.best = None if state["best"] is None else (state["best"][0], state["best"][1])
            self.pending = state["pending"]
            self.engine.load(self.team)

    @contextmanager
    def _listen(self) -> Iterator[None]:
        """Ctrl-C, SIGTERM and SIGHUP: leave at the next safe point; a second signal leaves at once."""

        def note(signum: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = signum

        try:
            before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if not ignored(s)}
        except ValueError:  # not in the main thread: whoever runs us handles signals
            before = {}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _check_signal(self) -> None:
        if self.signal is not None:
            raise Interrupted(self.signal)


def resolve_device(device: str) -> str:
    """ "auto" becomes cuda where there is one. Raises ConfigError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        if not device.startswith("cuda") or torch.cuda.is_available():
            reason = str(error).split("\n")[0]
            raise ConfigError(f"run.device={device!r} cannot be used: {reason}. Set run.device='cpu' or 'auto'.") from error
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"run.device={device!r}, but torch {torch.__version__} sees no GPU here. Set run.device='cpu'.")
    return device


def check_fit(config: Config) -> tuple[str, ...]:
    """The task's agents. Raises ConfigError where algorithm, protocol or models do not fit them."""
    env = plan_of(config, "train").env.make("train")
    agents = tuple(env.possible_agents)
    PROTOCOLS[config.rollout.protocol](env, Episode(0, 0, agents))
    name = config.algorithm.name
    if name in ("ac", "grpo") and len(agents) != 1:
        other = {"ac": "collm-cc", "grpo": "magrpo"}[name]
        raise ConfigError(
            f"algorithm.name={name!r} is for one agent, but {config.env.name} has {len(agents)}: {', '.join(agents)}. "
            f"Set algorithm.name={other!r}, or make the task for one agent."
        )
    lora = config.team.lora
    for setting, named in (("team.models", config.team.models), ("team.lora.agents", (lora and lora.agents) or ())):
        unknown = sorted(set(named) - set(agents))
        if unknown:
            raise ConfigError(f"{setting} names {', '.join(unknown)}, but the task's agents are {', '.join(agents)}.")
    return agents


def metric_names(config: Config) -> tuple[str, ...]:
    """Names of the numbers after a turn that critics may know: those after one of empty answers, less the diagnostics."""
    env = plan_of(config, "train").env.make("train")
    gate.reset(env, 0, 0)
    returned: Any = env.step(dict.fromkeys(env.agents, ""))  # its numbers are taken when episodes are played
    infos = returned[-1] if isinstance(returned, tuple) and isinstance(returned[-1], Mapping) else {}
    reported = [info.get("metrics") for info in infos.values() if isinstance(info, Mapping)]
    names = {str(name) for metrics in reported if isinstance(metrics, Mapping) for name in metrics}
    return tuple(sorted(names - frozenset(getattr(env, "diagnostics", ()))))


def make_team(config: Config, agents: tuple[str, ...]) -> Team:
    """Load each agent's model as `config.team` says; frozen team-mates on servers have none.

    Raises ConfigError where nobody is left.
    """
    team = config.team
    return Team.from_pretrained(
        {agent: team.models.get(agent, team.model) for agent in trained_agents(config, agents)},
        lora=team.lora,
        shared=team.shared,
        seed=seeds.derive(config.run.seed, "adapters"),
        compute=team.compute,
        device=config.run.device,
    )


def trained_agents(config: Config, agents: tuple[str, ...]) -> tuple[str, ...]:
    """The agents that are not played by servers. Raises ConfigError where there is none."""
    local = tuple(agent for agent in agents if agent not in config.team.remote)
    if not local:
        raise ConfigError(
            "every agent of team.models is a server: nothing is left to train here, and log-probs of answers to learn from are "
            "a local model's. Give one agent a model, or play such a team with `collm play`."
        )
    return local


def with_remote(engine: Engine, config: Config) -> Engine:
    """`engine`, beside it servers for the frozen team-mates that live there."""
    if not config.team.remote:
        return engine
    from collm.engines.http import HttpEngine, endpoint
    from collm.engines.mixed import MixedEngine

    key_env = config.team.api_key_env or ""
    servers = HttpEngine({agent: endpoint(agent, url, key_env=key_env) for agent, url in config.team.remote.items()})
    return MixedEngine(engine, dict.fromkeys(config.team.remote, servers))


def draw_tasks(seed: int, iteration: int, count: int, total: int) -> list[int]:
    """Tasks of one iteration: every task once, in a new order, before any comes again."""
    drawn: list[int] = []
    position, end = iteration * count, (iteration + 1) * count
    while position < end:
        order = list(range(total))
        seeds.stream(seed, "tasks", position // total).shuffle(order)
        drawn += order[position % total :][: end - position]
        position = iteration * count + len(drawn)
    return drawn
