"""One iteration's episodes as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from collm.types import Episode, Group


@dataclass(slots=True)
class Batch:
    """One iteration's episodes as tensors: E episodes, N agents, T turns of the longest episode; without failed episodes.

    Example: Batch.of([Group(0, [episode])], ("a", "b")).shape == (1, 2, len(episode.turns))
    """

    groups: list[Group]
    """Groups without failed episodes; empty groups are left out."""
    episodes: list[Episode]
    """(E,) the episodes of `groups`, in order."""
    numbers: list[int]
    """(E,) each episode's index among all episodes of the iteration, failed ones included."""
    agents: tuple[str, ...]
    """(N,) the agents that are trained."""
    rewards_ET: Tensor
    """(E, T) joint rewards; 0 after the end."""
    live_ENT: Tensor
    """(E, N, T) 1 where the agent acted and the turn is the episode's own, else 0."""
    num_turns_E: Tensor
    """(E,) int64, turns played."""
    truncated_E: Tensor
    """(E,) bool, whether the episode was cut off before its end."""

    @classmethod
    def of(cls, groups: Sequence[Group], agents: Sequence[str]) -> Batch:
        """The batch of these groups for these agents."""
        everyone = [episode for group in groups for episode in group.episodes]
        numbers = [number for number, episode in enumerate(everyone) if _counts(episode)]
        kept = [Group(g.task, _owned([e for e in g.episodes if _counts(e)])) for g in groups]
        kept = [group for group in kept if group.episodes]
        episodes = [episode for group in kept for episode in group.episodes]
        E, N, T = len(episodes), len(agents), max((len(e.turns) for e in episodes), default=0)
        rewards, live = np.zeros((E, T)), np.zeros((E, N, T), dtype=np.float32)
        for e, episode in enumerate(episodes):
            for t, turn in enumerate(episode.turns):
                rewards[e, t] = turn.reward
                if t >= episode.own_from:
                    live[e, :, t] = [agent in turn.completions for agent in agents]
        return cls(
            kept,
            episodes,
            numbers,
            tuple(agents),
            torch.from_numpy(rewards).float(),
            torch.from_numpy(live),
            torch.tensor([len(e.turns) for e in episodes], dtype=torch.int64),
            torch.tensor([e.truncated for e in episodes], dtype=torch.bool),
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        E, N, T = self.live_ENT.shape
        return E, N, T

    @property
    def played_ET(self) -> Tensor:
        """(E, T) bool: turns that were played, by any agent."""
        return torch.arange(self.rewards_ET.shape[1]) < self.num_turns_E[:, None]

    @property
    def last_ET(self) -> Tensor:
        """(E, T) bool: the last turn of each episode."""
        return torch.arange(self.rewards_ET.shape[1]) == self.num_turns_E[:, None] - 1

    @property
    def complete_ET(self) -> Tensor:
        """(E, T) bool: turns of episodes that were not truncated, so that their return is complete."""
        return self.played_ET & ~self.truncated_E[:, None]

    @property
    def tasks_E(self) -> Tensor:
        return torch.tensor([episode.task for episode in self.episodes])

    def answers(self) -> list[tuple[int, int, str, int]]:
        """(episode, turn, agent, agent's index) of every answer that is trained on."""
        return [(e, t, self.agents[n], n) for e, n, t in self.live_ENT.nonzero().tolist()]

    def episodes_of(self, slots: Tensor, extra: bool = False) -> list[int]:
        """Indices of the episodes that slots belong to; `extra` for slots that count T + 1 turns."""
        _, N, T = self.shape
        return sorted(set((slots.cpu() // (N * (T + extra))).tolist()))


def _counts(episode: Episode) -> bool:
    return not episode.failure and bool(episode.turns)


def _owned(episodes: list[Episode]) -> list[Episode]:
    """Assign every joint action of a turn tree to the first leaf that holds it and has not failed."""
    owned: list[Episode] = []
    known: set[tuple[int, ...]] = set()
    for episode in episodes:
        if not episode.path:
            owned.append(episode)
            continue
        prefixes = [episode.path[: t + 1] for t in range(len(episode.turns))]
        first = next((t for t, prefix in enumerate(prefixes) if prefix not in known), len(prefixes))
        known.update(prefixes)
        owned.append(replace(episode, own_from=first))
    return owned
