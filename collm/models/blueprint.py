"""The blueprint: which agents, critics and references share which parameters. Without torch.

    settings + agents  ->  policies, critics, references  ->  units

The loaded team, the learner's parts, the memory plan and the names in a checkpoint are derived from it. Only this module
decides about sharing:

- with `team.shared`, agents with the same initial model share one policy; else each agent has its own;
- adapters of one model, in one number format, share one base, which is in memory once;
- a critic is a value head on its agent's policy, an adapter on the base of an agent, a frozen base, or a separate model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from collm.errors import ConfigError
from collm.models.sources import base_named_by, is_adapter, resolve
from collm.settings.rooms import Config, LoraSettings

POLICY, CRITIC, OPTIMIZER, REPLAY = "policy-", "critic-", "optimizer-", "replay-"
"""Prefixes of names in a checkpoint."""
FROZEN_REPLAY = 32
"""Default number of iterations that the regression on a frozen body learns from."""
MINIBATCH = 8
"""Sequences in one step of a critic with a replay."""
HISTOGRAM_BINS = 51
"""Bins of a critic with `critic.loss="hl_gauss"`."""

Body = Literal["policy", "adapter", "copy", "model", "frozen"]


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """A frozen base model of adapters and of critics with a frozen body, in memory once for all of them."""

    model: str
    """Absolute path of its folder, or its hub name."""
    dtype: str
    """Number format of its weights: "float32" or "bfloat16"."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy: a whole model, or an adapter on a base.

    Example: PolicySpec(("aux", "main"), "Qwen/Qwen3-1.7B") is one whole model that both agents share.
    """

    agents: tuple[str, ...]
    """The agents that use it, in the team's order."""
    model: str
    """Its initial model: a Hugging Face folder (a PEFT folder for an adapter), a hub name, or "tiny"; empty if unknown."""
    base: BaseSpec | None = None
    """The base, for an adapter."""
    lora: LoraSettings | None = None
    """The settings of a new adapter; None for one from a PEFT folder, which has its own."""

    def rate(self, config: Config) -> float:
        """Its learning rate: learner.lr if set, else 5e-4 for an adapter and `whole_model_rate` for a whole model."""
        return config.learner.lr or (5e-4 if self.base is not None else whole_model_rate(self.model))

    def head_rate(self, config: Config) -> float:
        """The learning rate of a value head on it: critic.lr if set, else its own."""
        return config.critic.lr or self.rate(config)

    @property
    def name(self) -> str:
        """The name of its first agent."""
        return self.agents[0]

    @property
    def weights_name(self) -> str:
        return POLICY + self.name

    @property
    def optimizer_name(self) -> str:
        return OPTIMIZER + self.name


@dataclass(frozen=True, slots=True)
class CriticSpec:
    """A critic and its body."""

    name: str
    """The name of its agent; "team" for a joint critic."""
    agents: tuple[str, ...]
    """The trained agents that it predicts values for."""
    joint: bool
    """It reads the joint history, frozen team-mates included; if false, the history of one agent."""
    kind: Literal["V", "Q"]
    """V of a history, or Q of a history and a joint action."""
    body: Body
    """"policy": `policy`'s model, with a value head on it. "adapter": an adapter like `policy`'s, on the same base. "copy": a
    copy of `policy`'s model, which shares nothing with it. "model": the body of `model`. "frozen": the base itself, which is
    not trained; a regression reads its hidden states."""
    policy: str
    """The name of the policy that `body` refers to; for "model", of the policy of its first agent."""
    model: str
    """Initial model of the body; empty if a policy's origin is unknown."""
    base: BaseSpec | None = None
    """The base, for an adapter and for a frozen body."""
    replay: int = 1
    """Number of recent iterations that it learns from."""

    def rate(self, config: Config) -> float:
        """The learning rate of a separate critic model: critic.lr if set, else 1e-4 for an adapter, whose values overshoot at a
        policy's rate, and a policy's rate for a whole model."""
        if config.critic.lr is not None or self.body == "adapter":
            return config.critic.lr or 1e-4
        return config.learner.lr or whole_model_rate(self.model)

    @property
    def label(self) -> str:
        """Its label in metrics."""
        return "critic" if self.joint else f"{self.name}/critic"

    @property
    def weights_name(self) -> str:
        return CRITIC + self.name

    @property
    def optimizer_name(self) -> str:
        """The name of its own optimizer; for a value head, of the policy's."""
        return OPTIMIZER + (self.policy if self.body == "policy" else self.weights_name)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """Its files in a checkpoint: weights and optimizer if it is trained, and the iterations kept."""
        trained, kept = (self.weights_name, self.optimizer_name), (REPLAY + self.weights_name,)
        return kept if self.body == "frozen" else trained if self.replay == 1 else trained + kept


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """The frozen initial policy for the KL penalty: a copy of a whole model, or the base of an adapter."""

    policy: str
    """The name of that policy."""
    base: BaseSpec | None = None
    """The base, for an adapter."""


@dataclass(frozen=True, slots=True)
class Unit:
    """All policies and critics that share parameters, and the references that their updates read."""

    base: BaseSpec | None
    """The base of its adapters; None for a whole model."""
    policies: tuple[PolicySpec, ...]
    critics: tuple[CriticSpec, ...]
    references: tuple[ReferenceSpec, ...]

    @property
    def name(self) -> str:
        """The name of its first policy; of a critic that shares with no policy, the critic's label in metrics."""
        return self.policies[0].name if self.policies else self.critics[0].label


@dataclass(frozen=True, slots=True)
class Blueprint:
    """All policies, critics and references of a run, and which of them share parameters."""

    agents: tuple[str, ...]
    """The trained agents, in the team's order."""
    policies: tuple[PolicySpec, ...]
    """Each distinct policy once, in the order of their first agents."""
    critics: tuple[CriticSpec, ...] = ()
    references: tuple[ReferenceSpec, ...] = ()
    remote: tuple[str, ...] = ()
    """The frozen team-mates on servers; they have no parameters here."""
    metric_regression: bool = False
    """A regression of returns is added to the critics' predictions; with `critic.body="none"` it is V."""
    difference_baseline: bool = False
    """A difference baseline is subtracted."""
    views: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(name, agents) of each view that regressions read: one of all agents, "team", or each agent's own."""

    @classmethod
    def of(cls, config: Config, agents: Sequence[str]) -> Blueprint:
        """The blueprint of a recipe for an environment's agents. Raises ConfigError if all of them are on servers."""
        team = config.team
        remote = tuple(agent for agent in agents if agent in team.remote)
        models = {agent: team.models.get(agent, team.model) for agent in agents if agent not in remote}
        return cls.around(
            config, models, policies_of(models, lora=team.lora, shared=team.shared, compute=team.compute), remote=remote
        )

    @classmethod
    def around(
        cls, config: Config, agents: Iterable[str], policies: Iterable[PolicySpec], *, remote: tuple[str, ...] = ()
    ) -> Blueprint:
        """The blueprint with given policies, such as those of a loaded team."""
        agents, policies = tuple(agents), tuple(policies)
        if not agents:
            raise ConfigError(
                "every agent of team.models is a server: nothing is left to train here. Give one agent a model, or play such a "
                "team with `collm play`."
            )
        has_critic, text = config.algorithm.has_critic, config.critic.body != "none"
        critics = _critics(config, agents, policies) if has_critic and text else ()
        references = [ReferenceSpec(p.name, p.base) for p in policies if config.algorithm.kl_coef > 0]
        return cls(
            agents,
            policies,
            critics,
            tuple(references),
            remote,
            metric_regression=has_critic and (config.critic.metrics != "none" or not text),
            difference_baseline=config.algorithm.teammates != "none",
            views=tuple((agent, (agent,)) for agent in agents) if config.views_are_own else (("team", agents),),
        )

    def rates(self, config: Config) -> dict[str, float]:
        """Learning rate of every policy, under its agents' names, and of every critic, as metrics name it."""
        policies = {", ".join(policy.agents): policy.rate(config) for policy in self.policies}
        owners = {policy.name: policy for policy in self.policies}
        critics = {
            critic.label: owners[critic.policy].head_rate(config) if critic.body == "policy" else critic.rate(config)
            for critic in self.critics
            if critic.body != "frozen"
        }
        return {**policies, **critics}

    @property
    def labels(self) -> dict[str, str]:
        """Critic's label in metrics -> an agent that it predicts values for; regressions alone have those of critics."""
        views = self.views if self.metric_regression else ()
        alone = {"critic" if name == "team" else f"{name}/critic": agents[0] for name, agents in views}
        return {critic.label: critic.agents[0] for critic in self.critics} or alone

    def policy_of(self, agent: str) -> PolicySpec:
        """The policy of an agent. Raises KeyError if it has none."""
        return _owners(self.policies)[agent]

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each policy and critic is in exactly one unit. Ordered by policies, then by critics that share with no policy."""
        keys: dict[str, BaseSpec | str] = {policy.name: policy.base or policy.weights_name for policy in self.policies}
        owners = {
            critic.name: keys[critic.policy] if critic.body in ("policy", "adapter") else critic.base or critic.weights_name
            for critic in self.critics
        }
        return tuple(
            Unit(
                key if isinstance(key, BaseSpec) else None,
                tuple(policy for policy in self.policies if keys[policy.name] == key),
                tuple(critic for critic in self.critics if owners[critic.name] == key),
                tuple(reference for reference in self.references if keys[reference.policy] == key),
            )
            for key in dict.fromkeys([*keys.values(), *owners.values()])
        )

    @property
    def parts(self) -> tuple[CriticSpec | PolicySpec, ...]:
        """What learns by itself, in the learner's order: critics that are no value heads, then policies."""
        return (*(critic for critic in self.critics if critic.body != "policy"), *self.policies)

    def alone(self, unit: Unit) -> Blueprint:
        """The blueprint with the policies, critics and references of one unit."""
        return replace(self, policies=unit.policies, critics=unit.critics, references=unit.references)

    @property
    def checkpoint_names(self) -> tuple[str, ...]:
        """File names, without extension, of weights, optimizers and kept iterations in a checkpoint; those of regressions of
        the learner are not included."""
        names: list[tuple[str, ...]] = [(policy.weights_name, policy.optimizer_name) for policy in self.policies]
        names += [critic.checkpoint_names for critic in self.critics]
        return tuple(dict.fromkeys(name for each in names for name in each))


def policies_of(
    models: Mapping[str, str], *, lora: LoraSettings | None = None, shared: bool = False, compute: str = "float32"
) -> tuple[PolicySpec, ...]:
    """The policies of a team.

    Args:
        models: agent -> initial model.
        lora: train adapters, for the agents that it names or for all.
        shared: agents with the same initial model share one policy.
        compute: number format of the bases of new adapters.
    """
    found: dict[object, PolicySpec] = {}
    for agent, model in models.items():
        mine = lora if lora is not None and (lora.agents is None or agent in lora.agents) else None
        key = (model, mine is not None) if shared else agent
        if (before := found.get(key)) is not None:
            found[key] = PolicySpec((*before.agents, agent), before.model, before.base, before.lora)
        else:
            found[key] = PolicySpec((agent,), model, base_of(model, mine, compute), mine)
    return tuple(found.values())


def whole_model_rate(model: str) -> float:
    """Default learning rate of a whole model: 5e-4 for "tiny", 5e-6 for any other, which the higher rate would destabilize."""
    return 5e-4 if resolve(model) == resolve("tiny") else 5e-6


def base_of(model: str, lora: LoraSettings | None, compute: str) -> BaseSpec | None:
    """The base of a policy with this initial model; None for a whole model. A PEFT folder names its base."""
    if is_adapter(model):
        return BaseSpec(resolve(base_named_by(model)), "float32" if lora is None else compute)
    return None if lora is None else BaseSpec(resolve(model), compute)


def saved_policies(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the policies among names in a checkpoint."""
    return tuple(name.removeprefix(POLICY) for name in names if name.startswith(POLICY))


def _owners(policies: Iterable[PolicySpec]) -> dict[str, PolicySpec]:
    """Agent -> its policy."""
    return {agent: policy for policy in policies for agent in policy.agents}


def _critics(config: Config, team: tuple[str, ...], policies: tuple[PolicySpec, ...]) -> tuple[CriticSpec, ...]:
    owners, joint = _owners(policies), config.critic.reads == "joint"
    views = {"team": team} if joint else {agent: (agent,) for agent in team}
    critics = []
    for name, agents in views.items():
        owner = owners[agents[0]]
        body, beside, model = _body(config, owner, policies)
        base = beside.base if body in ("policy", "adapter") else _frozen(config, model, policies) if body == "frozen" else None
        replay = config.critic.replay or (FROZEN_REPLAY if body == "frozen" else 1)
        critics.append(CriticSpec(name, agents, joint, config.algorithm.critic_kind, body, beside.name, model, base, replay))
    return tuple(critics)


def _body(config: Config, owner: PolicySpec, policies: tuple[PolicySpec, ...]) -> tuple[Body, PolicySpec, str]:
    """(body, policy, model) of a critic; owner: the policy of the first agent whose texts it reads."""
    if config.critic.body == "policy":
        return "policy", owner, owner.model
    model = config.critic.model or (owner.base.model if owner.base is not None else owner.model)
    if config.critic.body == "frozen":
        return "frozen", owner, model
    if model and config.critic.body == "auto":
        for policy in policies:
            if policy.base is not None and policy.base.model == resolve(model):
                return "adapter", policy, model
    if config.critic.model is None and owner.base is None:
        return "copy", owner, model
    return "model", owner, model


def _frozen(config: Config, model: str, policies: tuple[PolicySpec, ...]) -> BaseSpec:
    """The base that a frozen body is: that of an agent's adapter if it is of the same model."""
    if not model:
        raise ConfigError(
            "critic.body='frozen' reads with the initial model of an agent, whose origin is unknown here. Set critic.model, or "
            "critic.body='auto'."
        )
    bases = (policy.base for policy in policies if policy.base is not None and policy.base.model == resolve(model))
    return next(bases, BaseSpec(resolve(model), config.team.compute))
