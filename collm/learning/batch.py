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
    """One iteration's episodes as tensors: E episodes, N agents, T turns of the longest; failed episodes are left out.

    rewards_ET: joint rewards, 0 past the end. live_ENT: 1 where the agent acted and the turn is the episode's own.
    num_turns_E: turns played. truncated_E: cut off by the collector. numbers: of each episode, its place among all episodes of
    the iteration, failed ones counted.
    """

    groups: list[Group]
    episodes: list[Episode]
    numbers: list[int]
    agents: tuple[str, ...]
    rewards_ET: Tensor
    live_ENT: Tensor
    num_turns_E: Tensor
    truncated_E: Tensor

    @classmethod
    def of(cls, groups: Sequence[Group], agents: Sequence[str]) -> Batch:
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
        """True at every turn that an episode had, whoever acted in it."""
        return torch.arange(self.rewards_ET.shape[1]) < self.num_turns_E[:, None]

    @property
    def last_ET(self) -> Tensor:
        """True at an episode's last turn."""
        return torch.arange(self.rewards_ET.shape[1]) == self.num_turns_E[:, None] - 1

    @property
    def complete_ET(self) -> Tensor:
        """True at every turn of episodes whose return is known to the end."""
        return self.played_ET & ~self.truncated_E[:, None]

    @property
    def tasks_E(self) -> Tensor:
        return torch.tensor([episode.task for episode in self.episodes])

    def answers(self) -> list[tuple[int, int, str, int]]:
        """(episode, turn, agent, agent's number) of every answer that is learned from."""
        return [(e, t, self.agents[n], n) for e, n, t in self.live_ENT.nonzero().tolist()]

    def episodes_of(self, slots: Tensor, extra: bool = False) -> list[int]:
        """Numbers of the episodes that slots belong to; `extra` for slots that count T + 1 turns."""
        _, N, T = self.shape
        return sorted(set((slots.cpu() // (N * (T + extra))).tolist()))


def _counts(episode: Episode) -> bool:
    return not episode.failure and bool(episode.turns)


def _owned(episodes: list[Episode]) -> list[Episode]:
    """Give every joint action of a turn tree to the first leaf that still holds it: one whose leaf failed is not lost."""
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
