"""From settings to parts: which critics there are, what they share with the agents, and the learner that calls them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from collm import seeds
from collm.config import Config
from collm.learning.learner import Learner
from collm.learning.parts import CriticPart, LocalHands, PolicyPart
from collm.learning.residual import Regressions
from collm.models.critic import Critic, ValueHead
from collm.models.policy import Policy
from collm.models.team import Team
from collm.types import Sampling


def make_learner(team: Team, config: Config, sampling: Sampling, metric_names: Sequence[str] = ()) -> Learner:
    """A learner with all parts in this process: critics first, then one part for each distinct policy of the team.

    Args: sampling: what answers are sampled with. metric_names: the environment metrics that the metric regression reads.
    """
    settings, members = config.algorithm, team.members()
    views: dict[str, dict[str, tuple[str, ...]]] = {
        "none": {},
        "joint": {"team": team.agents},
        "own": {agent: (agent,) for agent in team.agents},
    }
    view = views[settings.critic]
    on_policy = settings.critic_body == "policy"
    heads: dict[str, dict[str, ValueHead]] = {name: {} for name in members}
    critics: list[CriticPart] = []
    for name, agents in view.items():
        policy = team.policies[agents[0]]
        if on_policy:
            owner = next(member for member, other in members.items() if other is policy)
            width = policy.model.config.get_text_config().hidden_size
            heads[owner][name] = ValueHead(width).to(policy.device)
        else:
            critics.append(CriticPart(name, _make_critic(name, team, policy, config), agents, config))
    policies = [
        PolicyPart(name, policy, [a for a, other in team.policies.items() if other is policy], heads[name], config, sampling)
        for name, policy in members.items()
    ]
    labels = {("critic" if settings.critic == "joint" else f"{name}/critic"): agents[0] for name, agents in view.items()}
    regressions = None
    if view:
        regressions = Regressions(
            metric_names, len(team.agents), metrics=config.critic.metrics, teammates=config.critic.difference
        )
    return Learner(LocalHands([*critics, *policies]), team.agents, labels, regressions, config)


def _make_critic(name: str, team: Team, policy: Policy, config: Config) -> Critic:
    """A critic model: an adapter on the base of some agent, a copy of the agent's own model, or a model of its own."""
    settings = config.critic
    common: dict[str, Any] = {"max_tokens": settings.max_tokens, "compute": policy.compute}
    base = None
    if config.team.lora is None or config.team.lora.critics:
        base = team.base_of(settings.model or policy.source)
    if base is not None:
        adapter = base.add_like(base.adapters[0], seeds.derive(config.run.seed, "critic's adapter", name))
        return Critic(adapter, base.tokenizer, **common).to(policy.device)
    if settings.model is None and policy.adapter is None:
        return Critic(copy.deepcopy(policy.body), policy.tokenizer, **common).to(policy.device)
    return Critic.from_pretrained(settings.model or policy.source, device=policy.device, **common)
