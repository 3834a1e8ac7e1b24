"""A plan: how episodes are played and what is replayed afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from collm.envs.base import EnvMaker
from collm.errors import ConfigError
from collm.types import Example, History, Sampling

DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True)
class Plan:
    """How episodes are played and what is replayed afterwards. Example: Plan(EnvSpec("agree"), group_size=4)"""

    env: EnvMaker
    split: str = "train"
    protocol: str = "parallel"
    """A name in `protocols.PROTOCOLS`: who speaks when, seeing what."""
    history: History = "full"
    """What an agent reads of its own history: `Episode.history`."""
    max_turns: int | None = None
    """Episodes are truncated after this number of turns."""
    sampling: Sampling = DEFAULT_SAMPLING
    agent_sampling: tuple[tuple[str, Sampling], ...] = ()
    """(agent, sampling) for agents whose sampling differs."""
    group_size: int = 1
    """Episodes per task, or joint answers per node of a turn tree."""
    tree: bool = False
    """Grow a turn tree per task instead of whole episodes."""
    resamples: int = 0
    """K answers resampled per agent and turn, for counterfactual baselines (`Turn.alternatives`)."""
    no_op: bool = False
    """Replay each turn with one agent's answer empty, for difference baselines (`Turn.no_op`)."""
    examples: tuple[Example, ...] = ()
    """Worked examples that agents read before their histories."""
    agents: tuple[str, ...] | None = None
    """Agents whose answers are resampled and replaced in no-op replays; default: all."""

    def sampling_of(self, agent: str) -> Sampling:
        return dict(self.agent_sampling).get(agent, self.sampling)

    def check_decentralized(self) -> None:
        """Raises ConfigError if agents read each other within a turn: turn trees, resampled answers and no-op replays reuse
        recorded histories, which then would not be valid."""
        if self.protocol != "parallel":
            raise ConfigError(f"rollout.protocol={self.protocol!r} is for evaluation alone. Set rollout.protocol='parallel'.")
