"""A plan: how episodes are played, and what else is asked about them."""

from __future__ import annotations

from dataclasses import dataclass

from collm.envs.base import EnvMaker
from collm.errors import ConfigError
from collm.types import History, Sampling

DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Plan:
    """How episodes are played, and what else is asked about them. Example: Plan(EnvSpec("agree"), group_size=4)"""

    env: EnvMaker
    split: str = "train"
    protocol: str = "parallel"
    """Who speaks when, seeing what: a name in `protocols.PROTOCOLS`."""
    history: History = "full"
    """What an agent reads of its own history."""
    max_turns: int | None = None
    """Episodes are truncated after this number of turns."""
    sampling: Sampling = DEFAULT_SAMPLING
    agent_sampling: tuple[tuple[str, Sampling], ...] = ()
    """(agent, sampling) where an agent's differs."""
    group_size: int = 1
    """Episodes per task, or joint answers per node of a turn tree."""
    tree: bool = False
    """Grow a turn tree per task instead of whole episodes."""
    resamples: int = 0
    """Other answers drawn per agent and turn, for counterfactual baselines (`Turn.alternatives`)."""
    no_op: bool = False
    """Replay each turn with one agent's answer empty, for difference baselines (`Turn.no_op`)."""
    agents: tuple[str, ...] | None = None
    """Agents that resampling and no-op replays are for; default: all."""

    def sampling_of(self, agent: str) -> Sampling:
        return dict(self.agent_sampling).get(agent, self.sampling)

    def check_decentralized(self) -> None:
        """Turn trees, resampled answers and no-op replays reuse recorded histories, so agents must not read each other within a
        turn. Raises ConfigError."""
        if self.protocol != "parallel":
            raise ConfigError(f"rollout.protocol={self.protocol!r} is for evaluation alone. Set rollout.protocol='parallel'.")
