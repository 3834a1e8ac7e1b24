"""Assembles a run from settings: a team, an engine, a collector and a learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from collm import seeds
from collm.algorithms.catalogue import group_estimator
from collm.cluster.hands import RemoteSeat, SeatEngine, SeatHands, SeatTeam, WideSeat
from collm.cluster.heartbeat import Heartbeat
from collm.cluster.places import needs_of, needs_of_workers, place
from collm.cluster.seats import Contents
from collm.cluster.sharded import Rollouts, check_everywhere
from collm.engines.base import Engine
from collm.engines.catalogue import make_engine
from collm.errors import ConfigError
from collm.learning.frozen import FrozenPart
from collm.learning.learner import Learner, PartsLearner
from collm.learning.parts import CriticPart, Hands, LocalHands, Part, PolicyPart
from collm.learning.ranks import ALONE, Ranks
from collm.learning.residual import Regressions
from collm.machine import usable_cores
from collm.models.adapters import Base
from collm.models.blueprint import BaseSpec, Blueprint, CriticSpec, Unit
from collm.models.critic import HEADS, Critic, Head
from collm.models.policy import Policy, multiplies_bfloat16
from collm.models.sources import fetch_adapter
from collm.models.team import AnyTeam, Team
from collm.models.trial import try_critic, try_team
from collm.rollout.collector import Collector, LocalCollector
from collm.rollout.plan import Plan
from collm.runs.directory import with_absolute_data
from collm.runs.heap import HEAP
from collm.runs.output import complain
from collm.runs.trackers import check_installed
from collm.settings.rooms import Config, EnvSettings
from collm.training.task import check_fit, metric_names, num_tasks, plan_of, trained_agents, training_tasks
from collm.types import Example, Sampling


@dataclass(slots=True)
class Assembly:
    """The objects of a run."""

    team: Any
    """`AnyTeam`, of the kind that its engine loads."""
    engine: Engine
    collector: Collector
    learner: Learner
    plan: Plan
    """How training episodes are played."""
    tasks: list[int]
    """The tasks that training plays."""
    rates: dict[str, float]
    """Learning rate by policy and critic, as the settings or their defaults have it."""


def prepare(config: Config) -> Config:
    """The config of the run directory, with this machine's threads and device and with absolute data paths; this process uses
    those threads and returns freed memory. On a cluster every process has as many threads, and the device is chosen there.

    Raises ConfigError for settings that cannot train, or a device that is not available.
    """
    config.check_trains()
    check_installed(config.run.trackers)
    apart = config.cluster.address is not None
    threads, device = config.run.threads or usable_cores(), config.run.device if apart else resolve_device(config.run.device)
    torch.set_num_threads(threads)
    HEAP.restrict()
    options = with_absolute_data(config.env.options, Path.cwd())
    env = EnvSettings.model_validate({"name": config.env.name, **options})
    if apart:
        config = with_absolute_models(config)
    return config.model_copy(update={"run": config.run.model_copy(update={"threads": threads, "device": device}), "env": env})


def with_absolute_models(config: Config) -> Config:
    """The config with the paths of model folders made absolute: other processes may run in other folders."""

    def absolute(model: str) -> str:
        return str(Path(model).absolute()) if model != "tiny" and Path(model).is_dir() else model

    models = {agent: absolute(model) for agent, model in config.team.models.items()}
    team = config.team.model_copy(update={"model": absolute(config.team.model), "models": models})
    critic = config.critic.model_copy(update={"model": config.critic.model and absolute(config.critic.model)})
    return config.model_copy(update={"team": team, "critic": critic})


def assemble(
    config: Config,
    *,
    team: Team | None = None,
    engine: Engine | None = None,
    collector: Collector | None = None,
    learner: Learner | None = None,
    examples: tuple[Example, ...] = (),
    stop: Callable[[], None] = lambda: None,
) -> Assembly:
    """Create the objects of a prepared config. Raises ConfigError if something does not fit the environment.

    Args:
        team, engine, collector, learner, examples: used instead of those of the config.
        stop: called between engine calls; raises to leave early.
    """
    agents = check_fit(config)
    trained = trained_agents(config, agents)
    plan = plan_of(config, "train", trained, examples or None)
    tasks = training_tasks(plan)
    if config.evaluation.every:
        num_tasks(replace(plan, split="eval"))  # fail before training begins
    reads = config.algorithm.has_critic or config.algorithm.teammates != "none"
    names = metric_names(config) if reads else ()
    if config.cluster.address is not None:
        if team or engine or learner:
            raise ConfigError(
                f"cluster.address={config.cluster.address!r} trains models in processes of their own, but a team, an engine or "
                "a learner of this process is given. Leave them out, or set cluster.address='none'."
            )
        for agent in trained:
            fetch_adapter(config.team.models.get(agent, config.team.model))
        blueprint = Blueprint.of(config, agents)
        seated, engine, hands, away = make_seats(config, agents, blueprint, plan)
        learner, rates = learner_of(hands, config, blueprint, names), blueprint.rates(config)
        collector = collector or away or LocalCollector(engine, shards=config.rollout.shards, stop=stop)
        return Assembly(seated, engine, collector, learner, plan, tasks, rates)
    team = team or make_team(config, agents)
    if team.agents != trained:
        raise ConfigError(f"the team plays {team.agents}, but the task's agents are {agents}.")
    engine = engine or with_remote(make_engine(team, config.rollout), config)
    if not engine.trains:
        raise ConfigError(
            f"{type(engine).__name__} gives no token ids and log-probs: it can evaluate and play frozen team-mates, but not "
            "train. Use the local engine."
        )
    learner = learner or make_learner(team, config, plan.sampling, names)
    rates = Blueprint.around(config, team.agents, team.specs).rates(config)
    collector = collector or LocalCollector(engine, shards=config.rollout.shards, stop=stop)
    return Assembly(team, engine, collector, learner, plan, tasks, rates)


def unfiltered(team: AnyTeam, sampling: Sampling) -> dict[str, int]:
    """{"unfiltered_vocabulary": size of the largest} if answers are drawn from all of it at temperature 1 or more, else {}."""
    if sampling.temperature < 1 or sampling.top_p < 1 or sampling.top_k:
        return {}
    return {"unfiltered_vocabulary": team.vocabulary}


def resolve_device(device: str) -> str:
    """The device; "auto" is cuda if available, else cpu. Raises ConfigError for a device that is not available."""
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


def make_team(config: Config, agents: tuple[str, ...], *, only: Collection[str] | None = None) -> Team:
    """Load the models of `config.team` for all agents except frozen team-mates on servers, and try them.

    only: the policies that are loaded, by the names of their first agents.
    Raises ConfigError if no agent is left, or a model cannot be trained.
    """
    settings = config.team
    if settings.compute == "bfloat16" and config.run.device == "cpu" and not multiplies_bfloat16():
        complain(
            "collm: team.compute='bfloat16' takes up to eight times as long as 'float32' on this processor, which has no "
            "instructions for it. Set team.compute='float32'."
        )
    team = Team.from_pretrained(
        {agent: settings.models.get(agent, settings.model) for agent in trained_agents(config, agents)},
        lora=settings.lora,
        shared=settings.shared,
        seed=seeds.derive(config.run.seed, "adapters"),
        compute=settings.compute,
        device=config.run.device,
        system=settings.system,
        thinking=settings.thinking,
        only=only,
    )
    try_team(team, cached=config.rollout.engine == "local")
    return team


def with_remote(engine: Engine, config: Config) -> Engine:
    """`engine`, combined with an HTTP engine for frozen team-mates on servers."""
    if not config.team.remote:
        return engine
    from collm.engines.http import HttpEngine, endpoint
    from collm.engines.mixed import MixedEngine

    key_env = config.team.api_key_env or ""
    places = {agent: endpoint(agent, url, key_env=key_env) for agent, url in config.team.remote.items()}
    servers = HttpEngine(places, thinking=config.team.thinking)
    return MixedEngine(engine, dict.fromkeys(config.team.remote, servers))


def make_learner(team: Team, config: Config, sampling: Sampling, metric_names: Sequence[str] = ()) -> PartsLearner:
    """A learner with all parts in this process.

    Args: sampling: the distribution of training answers. metric_names: the environment metrics that regressions read.
    """
    blueprint = Blueprint.around(config, team.agents, team.specs)
    return learner_of(LocalHands(make_parts(team, config, blueprint, sampling)), config, blueprint, metric_names)


def learner_of(hands: Hands, config: Config, blueprint: Blueprint, metric_names: Sequence[str] = ()) -> PartsLearner:
    """A learner whose parts, those of the blueprint, are called by `hands`."""
    if not config.algorithm.has_critic:
        group_estimator(config.algorithm.baseline)  # refuse a faulty user-defined one before training
    reported = bool(metric_names)
    regressions = Regressions(
        dict(blueprint.views),
        metric_names,
        critic=config.algorithm.has_critic,
        returns=config.returns_read(reported=reported) if blueprint.metric_regression else None,
        changes=config.changes_read(reported=reported) if blueprint.difference_baseline else None,
        effects=config.algorithm.teammates == "effects",
    )
    return PartsLearner(hands, blueprint.agents, blueprint.labels, regressions, config)


def make_parts(team: Team | None, config: Config, blueprint: Blueprint, sampling: Sampling, ranks: Ranks = ALONE) -> list[Part]:
    """The parts of a blueprint, in the order of `Blueprint.parts`.

    team: it has the blueprint's policies. A critic that shares with none of them may take over the model of a policy that is
    only in the team; None if it needs none.
    """
    heads: dict[str, dict[str, Head]] = {spec.name: {} for spec in blueprint.policies}
    adapted = [] if team is None else [policy.adapter for policy in team.policies.values() if policy.adapter is not None]
    bases = {adapter.base.spec: adapter.base for adapter in adapted}
    parts: list[Part] = []
    for critic in blueprint.critics:
        policy = None if team is None else team.policies.get(critic.policy)
        if critic.body == "policy" and policy is not None:
            width = policy.model.config.get_text_config().hidden_size
            heads[critic.policy][critic.name] = HEADS[config.critic.loss](width).to(policy.device)
            continue
        model = _make_critic(critic, policy, config, bases, taken_over=critic.policy not in heads)
        if critic.body == "frozen":
            parts.append(FrozenPart(critic.name, model, critic.agents, config, replay=critic.replay))
        else:
            lr = critic.rate(config)
            parts.append(CriticPart(critic.name, model, critic.agents, config, lr=lr, replay=critic.replay, ranks=ranks))
    for spec in blueprint.policies:
        assert team is not None
        rates: dict[str, Any] = {"lr": spec.rate(config), "head_lr": spec.head_rate(config)}
        own = heads[spec.name]
        parts.append(PolicyPart(spec.name, team.policies[spec.name], spec.agents, own, config, sampling, ranks=ranks, **rates))
    return parts


def _make_critic(
    spec: CriticSpec, policy: Policy | None, config: Config, bases: dict[BaseSpec, Base], *, taken_over: bool
) -> Critic:
    """Create and try a critic model of the blueprint.

    policy: the one that `spec.policy` names, if it is in this process. bases: those in memory; that of a frozen body is added.
    taken_over: the policy is not trained here, and its model becomes the critic's.
    """
    common: dict[str, Any] = {
        "max_tokens": config.critic.max_tokens,
        "compute": config.team.compute if policy is None else policy.compute,
        "system": config.team.system,
        "loss": config.critic.loss,
    }
    device = config.run.device if policy is None else policy.device
    if spec.base is not None and spec.body == "frozen":
        if spec.base not in bases:
            bases[spec.base] = Base.from_pretrained(spec.model, dtype=spec.base.dtype, device=device)
        critic = Critic(bases[spec.base].bare(), bases[spec.base].tokenizer, **common).to(device)
    elif policy is None:
        critic = Critic.from_pretrained(spec.model, device=device, **common)
    elif spec.body == "adapter" and policy.adapter is not None:
        seed = seeds.derive(config.run.seed, "critic's adapter", spec.name)
        base = policy.adapter.base
        critic = Critic(base.add_like(policy.adapter, seed), base.tokenizer, **common).to(policy.device)
    elif spec.body == "copy":
        body = policy.body if taken_over else copy.deepcopy(policy.body)
        critic = Critic(body, policy.tokenizer, **common).to(policy.device)
    else:
        critic = Critic.from_pretrained(spec.model, device=device, **common)
    try_critic(critic)
    return critic


def _begin_process(config: Config) -> None:
    """Threads, heap and device of a process of the cluster. Raises ConfigError for a device that is not available."""
    torch.set_num_threads(config.run.threads or usable_cores())
    HEAP.restrict()
    resolve_device(config.run.device)


def make_unit(
    config: Config,
    agents: tuple[str, ...],
    blueprint: Blueprint,
    unit: Unit,
    sampling: Sampling,
    join: Callable[[], Ranks] = lambda: ALONE,
) -> Contents:
    """The models, engine and parts of one unit, for the seat whose process this is. They are those of the whole team.

    Args:
        agents: the environment's.
        blueprint: of the whole team.
        join: connects the processes of a unit that is in several.
    """
    _begin_process(config)
    ranks = join()
    copied = {critic.policy for critic in unit.critics if critic.body == "copy"}
    names = {policy.name for policy in unit.policies} or copied
    team = make_team(config, agents, only=names) if names else None
    parts = make_parts(team, config, blueprint.alone(unit), sampling, ranks)
    if team is None or not unit.policies:
        return Contents(None, None, parts)
    plays = not config.cluster.rollouts and (ranks.number == 0 or ranks.split)
    return Contents(team, make_engine(team, config.rollout) if plays else None, parts)


def make_player(config: Config, agents: tuple[str, ...]) -> Contents:
    """All policies and an engine, for the rollout worker whose process this is. agents: the environment's."""
    _begin_process(config)
    team = make_team(config, agents)
    return Contents(team, with_remote(make_engine(team, config.rollout), config), ())


def make_seats(
    config: Config, agents: tuple[str, ...], blueprint: Blueprint, plan: Plan
) -> tuple[SeatTeam, Engine, SeatHands, Collector | None]:
    """Team, engine and hands with every unit of the blueprint in a seat of the cluster, and the collector of rollout workers.

    Raises ConfigError where the cluster does not fit.
    """
    from collm.cluster.start import Cluster

    cluster = Cluster.connect(config.cluster.address or "local")
    try:
        devices = cluster.devices(config.run.device)
        run = config.run.model_copy(update={"device": devices[0].kind})
        known = config.model_copy(update={"run": run})
        workers = needs_of_workers(known, blueprint)
        if workers:
            check_everywhere(plan.env, ("train", "eval") if config.evaluation.every else ("train",), cluster)
        needs = needs_of(known, blueprint, max(devices, key=lambda device: device.memory))
        placed = place([*needs, *workers], devices)
        seats, filled = dict[str, RemoteSeat](), list[Callable[[], Any]]()
        for unit, need in zip(blueprint.units, needs, strict=True):
            own = [cluster.seat(name, placed[name]) for name in need.names]
            settings = placed[need.names[0]].adapt(config)
            make = partial(make_unit, settings, agents, blueprint, unit, plan.sampling)
            if need.ranks == 1:
                seats[unit.name] = own[0]
                filled.append(own[0].ask("fill", make))
                continue
            where = cluster.meeting_point(own[0], placed[need.names[0]])
            join = partial(Ranks.join, count=need.ranks, address=where, split=need.split, device=settings.run.device)
            seats[unit.name] = WideSeat(own, split=need.split, first=cluster.first)
            fills = [seat.ask("fill", partial(make, join=partial(join, number))) for number, seat in enumerate(own)]
            filled += fills
        homes = {agent: seats[unit.name] for unit in blueprint.units for policy in unit.policies for agent in policy.agents}
        rollouts = None
        if workers:
            rollouts = Rollouts(
                cluster,
                {worker.unit: placed[worker.unit] for worker in workers},
                lambda place: partial(make_player, place.adapt(config), agents),
                {policy.name: (homes[policy.name], policy.weights_name) for policy in blueprint.policies},
                shards=config.rollout.shards,
                restarts=config.cluster.restarts,
                ahead=config.rollout.ahead > 0,
            )
        vocabulary = max(wait() for wait in filled)
    except BaseException:
        cluster.close()
        raise
    team = SeatTeam({agent: homes[agent] for agent in blueprint.agents}, vocabulary)
    hands = SeatHands(seats, blueprint, cluster.share)
    if rollouts is not None:
        return team, rollouts, hands, rollouts
    return team, with_remote(SeatEngine(homes, cluster.close, Heartbeat(cluster.waiting)), config), hands, None
