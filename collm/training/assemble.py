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
from collm.models.blueprint import Blueprint, CriticSpec
from collm.models.critic import Critic, ValueHead
from collm.models.policy import Policy
from collm.models.team import Team
from collm.types import Sampling


def make_learner(team: Team, config: Config, sampling: Sampling, metric_names: Sequence[str] = ()) -> Learner:
    """A learner with all parts in this process: critics first, then one part for each distinct policy of the team.

    Args: sampling: what answers are sampled with. metric_names: the environment metrics that the metric regression reads.
    """
    blueprint = Blueprint.around(config, team.agents, team.specs)
    heads: dict[str, dict[str, ValueHead]] = {spec.name: {} for spec in blueprint.policies}
    critics: list[CriticPart] = []
    for critic in blueprint.critics:
        policy = team.policies[critic.policy]
        if critic.body == "policy":
            width = policy.model.config.get_text_config().hidden_size
            heads[critic.policy][critic.name] = ValueHead(width).to(policy.device)
        else:
            critics.append(CriticPart(critic.name, _make_critic(critic, policy, config), critic.agents, config))
    policies = [
        PolicyPart(spec.name, team.policies[spec.name], spec.agents, heads[spec.name], config, sampling)
        for spec in blueprint.policies
    ]
    labels = {critic.label: critic.agents[0] for critic in blueprint.critics}
    regressions = None
    if blueprint.critics:
        regressions = Regressions(
            metric_names,
            len(team.agents),
            metrics=blueprint.metric_regression,
            teammates=blueprint.difference_baseline,
        )
    return Learner(LocalHands([*critics, *policies]), team.agents, labels, regressions, config)


def _make_critic(spec: CriticSpec, policy: Policy, config: Config) -> Critic:
    """A critic model, as the blueprint has it; policy: the one that it names."""
    common: dict[str, Any] = {"max_tokens": config.critic.max_tokens, "compute": policy.compute}
    if spec.body == "adapter" and policy.adapter is not None:
        seed = seeds.derive(config.run.seed, "critic's adapter", spec.name)
        base = policy.adapter.base
        return Critic(base.add_like(policy.adapter, seed), base.tokenizer, **common).to(policy.device)
    if spec.body == "copy":
        return Critic(copy.deepcopy(policy.body), policy.tokenizer, **common).to(policy.device)
    return Critic.from_pretrained(spec.model, device=policy.device, **common)
