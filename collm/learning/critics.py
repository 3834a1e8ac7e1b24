"""Critics on text: values before an update, and the value loss.

A critic is a separate model or a value head on an agent's model. Both compute a value at each marker of a packed sequence.
`residual` has the regressions on environment metrics; `diagnostics` measures how well critics explain returns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from collm.learning.batch import Batch
from collm.learning.pack import MicroBatch, Packed, micro_batches, pack_readings
from collm.learning.ranks import ALONE, Ranks
from collm.models.blueprint import CRITIC
from collm.models.critic import Critic, Head
from collm.models.trees import Tree
from collm.settings.rooms import Config


class Body(Protocol):
    """Computes hidden states of token ids: a critic or a policy."""

    @property
    def device(self) -> torch.device: ...

    @property
    def reads_trees(self) -> bool: ...

    def hidden(self, ids_BL: Tensor, tree: Tree | None = None) -> Tensor: ...


@dataclass(slots=True)
class Values:
    """Values that critics compute from the text of one iteration's episodes."""

    values_ENT: Tensor
    """In units of return: V (E, N, T + 1), 0 after a terminal turn; or Q of the joint actions taken (E, N, T)."""
    read_ENT: Tensor
    """Same shape: 1 where a value was computed, else 0."""
    alternatives: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """For Q, one pair per critic: slots (M,) of answers, and Q (M, K) with that answer replaced by K resampled ones."""
    num_cut: int = 0
    """Histories whose oldest turns were cut to fit."""
    num_tokens: int = 0
    """Tokens read."""
    features: dict[str, Tensor] = field(default_factory=dict)
    """Name of a critic with a frozen body -> its features (E, T + 1, D), from which it learns."""


def without_text(batch: Batch) -> Values:
    """The part of V that is from text where no critic reads any: 0 before every turn played and after the last turn of a
    truncated episode."""
    E, N, T = batch.shape
    read_ET = torch.arange(T + 1) < (batch.num_turns_E + batch.truncated_E)[:, None]
    return Values(torch.zeros(E, N, T + 1), read_ET[:, None].float().repeat(1, N, 1))


def merge(parts: Iterable[Values]) -> Values:
    """The values of several critics for disjoint agents as one record."""
    first, *others = parts
    for other in others:
        first = Values(
            first.values_ENT + other.values_ENT,
            first.read_ENT + other.read_ENT,
            [*first.alternatives, *other.alternatives],
            first.num_cut + other.num_cut,
            first.num_tokens + other.num_tokens,
            first.features | other.features,
        )
    return first


class TextCritic:
    """A critic model, the agents that it predicts values for (all of them, or one), and what it reads."""

    def __init__(self, name: str, critic: Critic, agents: Sequence[str], config: Config):
        self.critic, self.agents, self.config = critic, tuple(agents), config
        self.joint = config.critic.reads == "joint"
        self.reads = {"state": config.critic.state, "newest_only": config.rollout.history == "newest"}
        self.name = CRITIC + name
        self.label = "critic" if self.joint else f"{name}/critic"

    def view(self, batch: Batch) -> tuple[str, ...]:
        """Agents whose texts it reads; a joint critic reads those of all agents, frozen team-mates included."""
        return batch.episodes[0].agents if self.joint and batch.episodes else self.agents

    def pack(self, batch: Batch) -> tuple[list[Packed], int]:
        """The sequences that it reads, and the number of histories that had to be cut."""
        kind = self.config.algorithm.critic_kind
        return pack_readings(batch, self.critic, self.view(batch), kind=kind, **self.reads)


def read(
    body: Body,
    head: Head,
    packed: Sequence[Packed],
    batch: Batch,
    agents: Sequence[str],
    limit: int,
    kind: str,
    *,
    ranks: Ranks = ALONE,
) -> Values:
    """Values at the markers of sequences.

    Args:
        agents: those that get these values; the markers' slots are of the first one.
        limit: maximum tokens in one forward pass.
        kind: "V" (T + 1 slots per agent) or "Q" (T slots).
        ranks: the processes that share the work; all get all values.
    """
    E, N, T = batch.shape
    values_X, num_tokens = values_at(body, head, packed, E * N * (T + (kind == "V")), limit, ranks)
    return shared(values_X, packed, batch, agents, num_tokens)


def shared(values_X: Tensor, packed: Sequence[Packed], batch: Batch, agents: Sequence[str], num_tokens: int) -> Values:
    """Values at the markers' slots, which are of the first of these agents, as those of all of them; 0 elsewhere. Arguments as
    in `read`."""
    E, N, _ = batch.shape
    marked_X = torch.zeros_like(values_X)
    marked_X[[slot for sequence in packed for slot, _ in sequence.markers]] = 1.0
    first, chosen = batch.agents.index(agents[0]), [batch.agents.index(agent) for agent in agents]
    read_ENT, marked_ENT = (values_X * marked_X).view(E, N, -1), marked_X.view(E, N, -1)
    found = Values(torch.zeros_like(read_ENT), torch.zeros_like(read_ENT), num_tokens=num_tokens)
    found.values_ENT[:, chosen], found.read_ENT[:, chosen] = read_ENT[:, first, None], marked_ENT[:, first, None]
    return found


@torch.no_grad()
def values_at(
    body: Body, head: Head, packed: Sequence[Packed], num: int, limit: int, ranks: Ranks = ALONE
) -> tuple[Tensor, int]:
    """Values (num,) at the markers' slots, 0 at slots without a marker; and the number of tokens read."""
    values_X, num_tokens = torch.zeros(num), 0
    micros = micro_batches(packed, limit, body.device, trees=body.reads_trees)
    for micro, counts in ranks.deal(micros):
        hidden_MD = body.hidden(micro.ids_BL, micro.tree)[micro.row_M, micro.column_M]
        if counts:
            values_X[micro.slot_M.cpu()] = head(hidden_MD).cpu()
            num_tokens += micro.num_tokens
    return ranks.add(values_X), int(ranks.total({"read": num_tokens})["read"])


def targeted(batch: Batch, *, kind: str, own_turns: bool) -> Tensor:
    """(E, N, T): 1 where a critic has a target: at every turn played, including turns after its agent has left.

    own_turns: only at the agent's own turns, for a value head on a policy, which reads those alone. Q has no target at the last
    turn of a truncated episode, since the next answers are unknown.
    """
    wanted_ENT = batch.live_ENT if own_turns else batch.played_ET[:, None].to(batch.live_ENT).expand_as(batch.live_ENT)
    if kind == "Q":
        wanted_ENT = wanted_ENT * ~(batch.last_ET & batch.truncated_E[:, None])[:, None]
    return wanted_ENT


def by_slot(targets_ENT: Tensor, wanted_ENT: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """(X,) targets in units of return, and (X,) bool where there is one, by the slots of markers."""
    wanted_ENT = wanted_ENT.bool()
    if kind == "V":  # V has T + 1 slots per agent
        targets_ENT, wanted_ENT = nn.functional.pad(targets_ENT, (0, 1)), nn.functional.pad(wanted_ENT, (0, 1))
    return targets_ENT.flatten(), wanted_ENT.flatten()


def value_loss(
    head: Head, micro: MicroBatch, hidden_BLD: Tensor, targets_X: Tensor, wanted_X: Tensor, *, num: int
) -> Tensor | None:
    """A micro-batch's part of the head's mean loss over `num` targets; None if it holds no target.

    Args:
        hidden_BLD: (B, L, D) hidden states of the micro-batch.
        targets_X, wanted_X: as of `by_slot`.
    """
    slot_M = micro.slot_M.cpu()
    chosen = wanted_X[slot_M]
    if not chosen.any():
        return None
    hidden_SD = hidden_BLD[micro.row_M, micro.column_M][chosen.to(hidden_BLD.device)]
    return head.loss(hidden_SD, targets_X[slot_M[chosen]].to(hidden_SD.device), num_values=num)
