"""The blueprint: which agents, critics and references share which parameters. Nothing here imports torch.

    settings + agents  ->  policies, critics, references  ->  units

The loaded team, the learner's parts, the memory plan and the names in a checkpoint follow it. Sharing is decided here alone:

- agents that start alike have one policy between them with `team.shared`, else one each;
- adapters of one model, in one number format, sit on one base that memory holds once;
- a critic is a value head on its agent's policy, an adapter on the base of some agent, or a model of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from collm.errors import ConfigError
from collm.models.sources import base_named_by, is_adapter, resolve
from collm.settings.rooms import Config, LoraSettings

POLICY, CRITIC, OPTIMIZER = "policy-", "critic-", "optimizer-"
"""What names in a checkpoint begin with."""

Body = Literal["policy", "adapter", "copy", "model"]


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """A frozen model that adapters sit on. Memory holds it once, whoever sits on it."""

    model: str
    """Its folder, as an absolute path, or its hub name."""
    dtype: str
    """Number format of its weights: "float32" or "bfloat16"."""


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A policy: a whole model, or an adapter on a base.

    Example: PolicySpec(("aux", "main"), "Qwen/Qwen3-1.7B") is one whole model that both agents share.
    """

    agents: tuple[str, ...]
    """The agents that it answers for, in the team's order."""
    model: str
    """What it starts from: a Hugging Face folder (a PEFT folder for an adapter), a hub name, or "tiny"; empty where unknown."""
    base: BaseSpec | None = None
    """What it sits on, for an adapter."""
    lora: LoraSettings | None = None
    """The settings of a new adapter. What a PEFT folder holds has its own."""

    def rate(self, config: Config) -> float:
        """Its learning rate: what learner.lr says, else 5e-4 for an adapter, and as `whole_model_rate` for a whole model."""
        return config.learner.lr or (5e-4 if self.base is not None else whole_model_rate(self.model))

    @property
    def name(self) -> str:
        """That of its first agent."""
        return self.agents[0]

    @property
    def weights_name(self) -> str:
        return POLICY + self.name

    @property
    def optimizer_name(self) -> str:
        return OPTIMIZER + self.name


@dataclass(frozen=True, slots=True)
class CriticSpec:
    """A critic, and what its body is."""

    name: str
    """That of its agent; "team" for a joint critic."""
    agents: tuple[str, ...]
    """The trained agents whose answers its values are for."""
    joint: bool
    """It reads the texts of all who play, frozen team-mates included, rather than those of one agent."""
    kind: Literal["V", "Q"]
    """V of a history, or Q of a history and the answers given to it."""
    body: Body
    """What it reads with. "policy": `policy`'s own model, to which it adds a value head. "adapter": an adapter like `policy`'s,
    on the same base. "copy": a copy of `policy`'s model, with which it then shares nothing. "model": the body of `model`."""
    policy: str
    """The name of the policy that `body` is about; for "model" of the one that answers for its first agent."""
    model: str
    """Where the body's weights come from; empty where a policy's origin is unknown."""
    base: BaseSpec | None = None
    """What it sits on, for an adapter."""

    def rate(self, config: Config) -> float:
        """The learning rate of a critic that is a model of its own: what critic.lr says, else 1e-4 for an adapter, whose values
        overshoot at a policy's rate, and a policy's for a whole model."""
        if config.critic.lr is not None or self.body == "adapter":
            return config.critic.lr or 1e-4
        return config.learner.lr or whole_model_rate(self.model)

    @property
    def label(self) -> str:
        """What metrics call it."""
        return "critic" if self.joint else f"{self.name}/critic"

    @property
    def weights_name(self) -> str:
        return CRITIC + self.name

    @property
    def optimizer_name(self) -> str:
        """That of its own optimizer, or of the policy's that trains a value head, too."""
        return OPTIMIZER + (self.policy if self.body == "policy" else self.weights_name)


@dataclass(frozen=True, slots=True)
class ReferenceSpec:
    """A policy as it was at the start, frozen, for the KL penalty: a copy of a whole model, or for an adapter its base."""

    policy: str
    """The name of that policy."""
    base: BaseSpec | None = None
    """What it sits on, for an adapter."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What cannot be held apart: all that share parameters, and the references that a policy's update reads."""

    base: BaseSpec | None
    """What its adapters sit on; None for a whole model."""
    policies: tuple[PolicySpec, ...]
    critics: tuple[CriticSpec, ...]
    references: tuple[ReferenceSpec, ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything that holds parameters, and who shares them."""

    agents: tuple[str, ...]
    """Those that are trained here, in the team's order."""
    policies: tuple[PolicySpec, ...]
    """Each distinct policy once, in the order of their first agents."""
    critics: tuple[CriticSpec, ...] = ()
    references: tuple[ReferenceSpec, ...] = ()
    remote: tuple[str, ...] = ()
    """The frozen team-mates, which servers play; they have no parameters here."""
    metric_regression: bool = False
    """Critics begin with what a regression on environment metrics predicts."""
    difference_baseline: bool = False
    """Regressions on no-op counterfactuals give a difference baseline."""

    @classmethod
    def of(cls, config: Config, agents: Sequence[str]) -> Blueprint:
        """The blueprint of a recipe for an environment's agents. Raises ConfigError where servers play all of them."""
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
        """The same around policies that are decided already, such as those of a loaded team."""
        agents, policies = tuple(agents), tuple(policies)
        if not agents:
            raise ConfigError(
                "every agent of team.models is a server: nothing is left to train here. Give one agent a model, or play such a "
                "team with `collm play`."
            )
        critics = _critics(config, agents, policies) if config.algorithm.has_critic else ()
        references = [ReferenceSpec(p.name, p.base) for p in policies if config.algorithm.kl_coef > 0]
        return cls(
            agents,
            policies,
            critics,
            tuple(references),
            remote,
            metric_regression=bool(critics) and config.critic.metrics,
            difference_baseline=config.algorithm.teammates == "replay",
        )

    def rates(self, config: Config) -> dict[str, float]:
        """Learning rate of every policy, under its agents' names, and of every critic, as metrics name it."""
        policies = {", ".join(policy.agents): policy.rate(config) for policy in self.policies}
        owners = {policy.name: policy for policy in self.policies}
        critics = {
            critic.label: critic.rate(config)
            if critic.body != "policy"
            else config.critic.lr or owners[critic.policy].rate(config)
            for critic in self.critics
        }
        return {**policies, **critics}

    def policy_of(self, agent: str) -> PolicySpec:
        """The policy that answers for an agent. Raises KeyError where none does."""
        return _owners(self.policies)[agent]

    @property
    def units(self) -> tuple[Unit, ...]:
        """Each policy and critic in exactly one, in the order of policies, then of critics that share with none of them."""
        keys: dict[str, BaseSpec | str] = {policy.name: policy.base or policy.weights_name for policy in self.policies}
        owners = {
            critic.name: keys[critic.policy] if critic.body in ("policy", "adapter") else critic.weights_name
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
    def checkpoint_names(self) -> tuple[str, ...]:
        """Names of the weights and optimizers in a checkpoint, without endings; regressions have names of their own."""
        trained: list[PolicySpec | CriticSpec] = [*self.policies, *self.critics]
        return tuple(dict.fromkeys(name for spec in trained for name in (spec.weights_name, spec.optimizer_name)))


def policies_of(
    models: Mapping[str, str], *, lora: LoraSettings | None = None, shared: bool = False, compute: str = "float32"
) -> tuple[PolicySpec, ...]:
    """The policies of a team: agent -> what it starts from.

    lora: agents (those that it names, or all) are adapters. shared: agents that start alike have one policy between them.
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
    """The learning rate of a whole model where the settings give none: the tiny one stands a rate that breaks a large one."""
    return 5e-4 if resolve(model) == resolve("tiny") else 5e-6


def base_of(model: str, lora: LoraSettings | None, compute: str) -> BaseSpec | None:
    """What a policy that starts from `model` sits on: None for a whole model. An adapter's folder names its base itself."""
    if is_adapter(model):
        return BaseSpec(resolve(base_named_by(model)), "float32" if lora is None else compute)
    return None if lora is None else BaseSpec(resolve(model), compute)


def saved_policies(names: Iterable[str]) -> tuple[str, ...]:
    """The names of the policies among names in a checkpoint."""
    return tuple(name.removeprefix(POLICY) for name in names if name.startswith(POLICY))


def _owners(policies: Iterable[PolicySpec]) -> dict[str, PolicySpec]:
    """Agent -> the policy that answers for it."""
    return {agent: policy for policy in policies for agent in policy.agents}


def _critics(config: Config, team: tuple[str, ...], policies: tuple[PolicySpec, ...]) -> tuple[CriticSpec, ...]:
    owners, joint = _owners(policies), config.critic.reads == "joint"
    views = {"team": team} if joint else {agent: (agent,) for agent in team}
    critics = []
    for name, agents in views.items():
        owner = owners[agents[0]]
        body, beside, model = _body(config, owner, policies)
        base = beside.base if body in ("policy", "adapter") else None
        critics.append(CriticSpec(name, agents, joint, config.algorithm.critic_kind, body, beside.name, model, base))
    return tuple(critics)


def _body(config: Config, owner: PolicySpec, policies: tuple[PolicySpec, ...]) -> tuple[Body, PolicySpec, str]:
    """(body, policy, model) of a critic; owner: the policy of the first agent whose texts it reads."""
    if config.critic.body == "policy":
        return "policy", owner, owner.model
    model = config.critic.model or (owner.base.model if owner.base is not None else owner.model)
    if model and config.critic.body == "auto":
        for policy in policies:
            if policy.base is not None and policy.base.model == resolve(model):
                return "adapter", policy, model
    if config.critic.model is None and owner.base is None:
        return "copy", owner, model
    return "model", owner, model
