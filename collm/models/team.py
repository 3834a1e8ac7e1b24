"""A team: ordered agents and their policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from collm.errors import ConfigError
from collm.models.adapters import Base
from collm.models.loading import resolve
from collm.models.policy import Policy
from collm.settings.rooms import LoraSettings


class Team:
    """Which policy answers for which agent. Agents that hold the same `Policy` object share its weights.

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
    ) -> Team:
        """One model per agent: Hugging Face folders or hub names, or "tiny".

        lora: agents (those that it names, or all) are adapters, and adapters of one model share one copy of it in memory.
        shared: agents that start alike get one policy between them. seed: decides what new adapters begin with.
        """
        bases: dict[tuple[str, str], Base] = {}
        known: dict[tuple[str, bool], Policy] = {}
        policies: dict[str, Policy] = {}
        for number, (agent, source) in enumerate(models.items()):
            mine = lora if lora is not None and (lora.agents is None or agent in lora.agents) else None
            key = source, mine is not None
            if not (shared and key in known):
                known[key] = Policy.from_pretrained(
                    source, compute=compute, device=device, lora=mine, seed=seed + number, bases=bases
                )
            policies[agent] = known[key]
        return cls(policies)

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(self.policies)

    def members(self) -> dict[str, Policy]:
        """Each distinct policy once, under the name of the first agent that it answers for."""
        members: dict[str, Policy] = {}
        for agent, policy in self.policies.items():
            if not any(policy is known for known in members.values()):
                members[agent] = policy
        return members

    def base_of(self, source: str) -> Base | None:
        """The model from `source` that agents' adapters sit on, if there is one."""
        bases = (policy.adapter.base for policy in self.policies.values() if policy.adapter is not None)
        return next((base for base in bases if source and base.source == resolve(source)), None)

    def save(self, folder: Path) -> None:
        """One ordinary Hugging Face folder per agent, named after it."""
        for agent, policy in self.policies.items():
            policy.save(folder / agent)
