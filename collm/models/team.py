"""A team: ordered agents and their policies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from collm.errors import ConfigError
from collm.models.policy import Policy


class Team:
    """Which policy answers for which agent. Agents that hold the same `Policy` object share its weights.

    Example: Team.from_pretrained({"aux": "Qwen/Qwen3-1.7B", "main": "Qwen/Qwen3-1.7B"})
    """

    def __init__(self, policies: Mapping[str, Policy]):
        if not policies:
            raise ConfigError("a team needs at least one agent.")
        self.policies = dict(policies)

    @classmethod
    def from_pretrained(
        cls, models: Mapping[str, str], *, compute: str = "float32", device: str | torch.device = "cpu"
    ) -> Team:
        """One whole model per agent, from Hugging Face folders or hub names, or "tiny"."""
        loaded = {agent: Policy.from_pretrained(source, compute=compute, device=device) for agent, source in models.items()}
        return cls(loaded)

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

    def save(self, folder: Path) -> None:
        """One ordinary Hugging Face folder per agent, named after it."""
        for agent, policy in self.policies.items():
            policy.save(folder / agent)
