"""Assembles a run from settings: a team, an engine, a collector and a learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from collm import seeds
from collm.algorithms.catalogue import group_estimator
from collm.engines.base import Engine
from collm.engines.catalogue import make_engine
from collm.errors import ConfigError
from collm.learning.frozen import FrozenPart
from collm.learning.learner import Learner, PartsLearner
from collm.learning.parts import CriticPart, LocalHands, Part, PolicyPart
from collm.learning.residual import Regressions
from collm.models.adapters import Base
from collm.models.blueprint import BaseSpec, Blueprint, CriticSpec
from collm.models.critic import HEADS, Critic, Head
from collm.models.policy import Policy
from collm.models.team import Team
from collm.models.trial import try_critic, try_team
from collm.rollout.collector import Collector, LocalCollector
from collm.rollout.plan import Plan
from collm.runs.directory import usable_cores, with_absolute_data
from collm.settings.rooms import Config, EnvSettings
from collm.training.heap import limit_heap
from collm.training.task import check_fit, metric_names, num_tasks, plan_of, trained_agents, training_tasks
from collm.types import Example, Sampling


@dataclass(slots=True)
class Assembly:
    """The objects of a run."""

    team: Team
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
    those threads and a limited heap.

    Raises ConfigError for settings that cannot train, or a device that is not available.
    """
    config.check_trains()
    threads, device = config.run.threads or usable_cores(), resolve_device(config.run.device)
    torch.set_num_threads(threads)
    limit_heap()
    options = with_absolute_data(config.env.options, Path.cwd())
    env = EnvSettings.model_validate({"name": config.env.name, **options})
    return config.model_copy(update={"run": config.run.model_copy(update={"threads": threads, "device": device}), "env": env})


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
    team = team or make_team(config, agents)
    if team.agents != trained:
        raise ConfigError(f"the team plays {team.agents}, but the task's agents are {agents}.")
    engine = engine or with_remote(make_engine(team, config.rollout), config)
    if not engine.trains:
        raise ConfigError(
            f"{type(engine).__name__} gives no token ids and log-probs: it can evaluate and play frozen team-mates, but not "
            "train. Use the local engine."
        )
    if learner is None:
        reads = config.algorithm.has_critic or config.algorithm.teammates != "none"
        learner = make_learner(team, config, plan.sampling, metric_names(config) if reads else ())
    rates = Blueprint.around(config, team.agents, team.specs).rates(config)
    return Assembly(team, engine, collector or LocalCollector(engine, stop=stop), learner, plan, tasks, rates)


def unfiltered(team: Team, sampling: Sampling) -> dict[str, int]:
    """{"unfiltered_vocabulary": size of the largest} if answers are drawn from all of it at temperature 1 or more, else {}."""
    if sampling.temperature < 1 or sampling.top_p < 1 or sampling.top_k:
        return {}
    return {"unfiltered_vocabulary": max(p.model.config.get_text_config().vocab_size for p in team.policies.values())}


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


def make_team(config: Config, agents: tuple[str, ...]) -> Team:
    """Load the models of `config.team` for all agents except frozen team-mates on servers, and try them.

    Raises ConfigError if no agent is left, or a model cannot be trained.
    """
    settings = config.team
    team = Team.from_pretrained(
        {agent: settings.models.get(agent, settings.model) for agent in trained_agents(config, agents)},
        lora=settings.lora,
        shared=settings.shared,
        seed=seeds.derive(config.run.seed, "adapters"),
        compute=settings.compute,
        device=config.run.device,
        system=settings.system,
        thinking=settings.thinking,
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
    """A learner with all parts in this process: critics first, then one part for each distinct policy of the team.

    Args: sampling: the distribution of training answers. metric_names: the environment metrics that regressions read.
    """
    blueprint = Blueprint.around(config, team.agents, team.specs)
    if not config.algorithm.has_critic:
        group_estimator(config.algorithm.baseline)  # refuse a faulty user-defined one before training
    heads: dict[str, dict[str, Head]] = {spec.name: {} for spec in blueprint.policies}
    critics: list[Part] = []
    bases = {policy.adapter.base.spec: policy.adapter.base for policy in team.policies.values() if policy.adapter is not None}
    for critic in blueprint.critics:
        policy = team.policies[critic.policy]
        if critic.body == "policy":
            width = policy.model.config.get_text_config().hidden_size
            heads[critic.policy][critic.name] = HEADS[config.critic.loss](width).to(policy.device)
            continue
        model = _make_critic(critic, policy, config, bases)
        if critic.body == "frozen":
            critics.append(FrozenPart(critic.name, model, critic.agents, config, replay=critic.replay))
        else:
            lr = critic.rate(config)
            critics.append(CriticPart(critic.name, model, critic.agents, config, lr=lr, replay=critic.replay))
    policies = [
        PolicyPart(
            spec.name,
            team.policies[spec.name],
            spec.agents,
            heads[spec.name],
            config,
            sampling,
            lr=spec.rate(config),
            head_lr=spec.head_rate(config),
        )
        for spec in blueprint.policies
    ]
    labels = blueprint.labels
    reported = bool(metric_names)
    regressions = Regressions(
        dict(blueprint.views),
        metric_names,
        critic=config.algorithm.has_critic,
        returns=config.returns_read(reported=reported) if blueprint.metric_regression else None,
        changes=config.changes_read(reported=reported) if blueprint.difference_baseline else None,
        effects=config.algorithm.teammates == "effects",
    )
    return PartsLearner(LocalHands([*critics, *policies]), team.agents, labels, regressions, config)


def _make_critic(spec: CriticSpec, policy: Policy, config: Config, bases: dict[BaseSpec, Base]) -> Critic:
    """Create and try a critic model of the blueprint.

    Args: policy: the one that `spec.policy` names. bases: bases in memory, to which that of a frozen body is added.
    """
    common: dict[str, Any] = {
        "max_tokens": config.critic.max_tokens,
        "compute": policy.compute,
        "system": config.team.system,
        "loss": config.critic.loss,
    }
    if spec.base is not None and spec.body == "frozen":
        if spec.base not in bases:
            bases[spec.base] = Base.from_pretrained(spec.model, dtype=spec.base.dtype, device=policy.device)
        critic = Critic(bases[spec.base].bare(), bases[spec.base].tokenizer, **common).to(policy.device)
    elif spec.body == "adapter" and policy.adapter is not None:
        seed = seeds.derive(config.run.seed, "critic's adapter", spec.name)
        base = policy.adapter.base
        critic = Critic(base.add_like(policy.adapter, seed), base.tokenizer, **common).to(policy.device)
    elif spec.body == "copy":
        critic = Critic(copy.deepcopy(policy.body), policy.tokenizer, **common).to(policy.device)
    else:
        critic = Critic.from_pretrained(spec.model, device=policy.device, **common)
    try_critic(critic)
    return critic
