"""A team: ordered agents and their policies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

import torch

from collm.errors import ConfigError
from collm.models.adapters import Base
from collm.models.blueprint import BaseSpec, PolicySpec, policies_of
from collm.models.policy import Policy
from collm.settings.rooms import LoraSettings


class AnyTeam(Protocol):
    """What a trainer uses of a team, whose policies may be in this process (`Team`) or in others (`cluster.hands.SeatTeam`)."""

    @property
    def agents(self) -> tuple[str, ...]: ...

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the largest vocabulary."""
        ...

    def save(self, folder: Path) -> None:
        """Write one Hugging Face folder per agent, named after it."""
        ...


class Team:
    """Ordered agents and their policies. Agents with the same `Policy` object share its weights.

    Example: Team.from_pretrained({"aux": "Qwen/Qwen3-1.7B", "main": "Qwen/Qwen3-1.7B"}, lora=LoraSettings(rank=16))
    """

    def __init__(self, policies: Mapping[str, Policy]):
        if not policies:
            raise ConfigError("a team needs at least one agent.")
        self.policies = dict(policies)

    @classmethod
    def from_pretrained(
        cls,
        models: Mapping[str, str],
        *,
        lora: LoraSettings | None = None,
        shared: bool = False,
        seed: int = 0,
        compute: str = "float32",
        device: str | torch.device = "cpu",
        system: str | None = None,
        thinking: str | None = None,
        only: Collection[str] | None = None,
    ) -> Team:
        """Load one model per agent; `blueprint.policies_of` decides which agents share parameters.

        Args:
            models: agent -> Hugging Face folder, hub name, or "tiny".
            lora: train adapters, for the agents that it names or for all; adapters of one model share one base in memory.
            shared: agents with the same initial model share one policy.
            seed: determines the initial weights of new adapters.
            system: as `team.system`; None leaves it to the template.
            thinking: as `team.thinking`; None leaves it to the template.
            only: the policies that are loaded, by the names of their first agents; they are the same as in the whole team.
        """
        bases: dict[BaseSpec, Base] = {}
        loaded: dict[str, Policy] = {}
        order = list(models)
        for spec in policies_of(models, lora=lora, shared=shared, compute=compute):
            if only is not None and spec.name not in only:
                continue
            own = seed + order.index(spec.name)
            policy = Policy.from_pretrained(
                spec.model,
                compute=compute,
                device=device,
                lora=spec.lora,
                seed=own,
                bases=bases,
                system=system,
                thinking=thinking,
            )
            loaded |= dict.fromkeys(spec.agents, policy)
        return cls({agent: loaded[agent] for agent in models if agent in loaded})

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(self.policies)

    @property
    def vocabulary(self) -> int:
        """Number of tokens of the largest vocabulary."""
        return max(policy.model.config.get_text_config().vocab_size for policy in self.policies.values())

    def members(self) -> dict[str, Policy]:
        """Each distinct policy once, under the name of its first agent."""
        members: dict[str, Policy] = {}
        for agent, policy in self.policies.items():
            if not any(policy is known for known in members.values()):
                members[agent] = policy
        return members

    @property
    def specs(self) -> tuple[PolicySpec, ...]:
        """The entries of its policies in the blueprint."""
        return tuple(
            PolicySpec(
                tuple(agent for agent, other in self.policies.items() if other is policy),
                policy.source,
                policy.adapter.base.spec if policy.adapter is not None else None,
            )
            for policy in self.members().values()
        )

    def save(self, folder: Path) -> None:
        """Write one Hugging Face folder per agent, named after it."""
        for agent, policy in self.policies.items():
            policy.save(folder / agent)
