"""From episodes to padded batches, with one sequence for all turns that share a growing prefix.

If an agent's prompt at turn t + 1 begins with its prompt and answer at turn t, both turns are in one sequence and one forward
pass scores them. If a template or a task rewrites the prompt, a new sequence begins. The rule compares token ids, so it holds
for every chat template. Histories that critics read are packed by the same rule.

A slot identifies an answer or a value: (episode * num_agents + agent) * num_turns + turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from collm.errors import EngineError
from collm.learning.batch import Batch
from collm.models.critic import Critic
from collm.models.policy import Policy
from collm.models.sharing import joins, num_shared
from collm.models.trees import Tree
from collm.types import History, Ids


@dataclass(slots=True)
class Packed:
    """One sequence. Example: Packed(ids of 9 tokens, answers=[(4, 6, array([-0.1, -1.2, 0.0]))])"""

    ids: Ids
    """(L,) token ids."""
    answers: list[tuple[int, int, np.ndarray]] = field(default_factory=list)
    """(slot, position of the answer's first token, log-probs recorded when sampling)."""
    markers: list[tuple[int, int]] = field(default_factory=list)
    """(slot, position) where a value is computed."""


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences that begin alike as a tree in depth-first order, their common tokens once. One sequence is a row too."""

    sequences: list[Packed]
    columns: list[np.ndarray]
    """For each sequence, the columns of its tokens."""
    ids: Ids
    """(L,) token ids."""
    positions: np.ndarray
    """(L,) number of each token's ancestors."""
    ends: np.ndarray
    """(L,) column after each token's last descendant."""

    @classmethod
    def of(cls, sequences: list[Packed]) -> Row:
        """The row of sequences in sorted order."""
        columns, sizes, total = [np.arange(len(sequences[0].ids))], [len(sequences[0].ids)], len(sequences[0].ids)
        for before, sequence in pairwise(sequences):
            shared = num_shared(before.ids, sequence.ids)
            size = len(sequence.ids) - shared
            columns.append(np.concatenate([columns[-1][:shared], np.arange(total, total + size)]))
            total += size
            sizes.append(total)
        ids, positions, ends = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int64), np.zeros(total, dtype=np.int64)
        for sequence, column_L, size in zip(sequences, columns, sizes, strict=True):
            ids[column_L], positions[column_L], ends[column_L] = sequence.ids, np.arange(len(column_L)), size
        return cls(sequences, columns, ids, positions, ends)

    @property
    def branches(self) -> bool:
        return len(self.ids) > max(len(sequence.ids) for sequence in self.sequences)


@dataclass(slots=True)
class MicroBatch:
    """B padded rows, with K answer tokens of S concatenated answers and M markers."""

    ids_BL: Tensor
    """(B, L) token ids, padded at the right."""
    tree: Tree | None
    """Positions and branches; None if every row is one sequence."""
    row_K: Tensor
    """(K,) row of each answer token."""
    column_K: Tensor
    """(K,) position of the hidden state that predicts each answer token."""
    token_K: Tensor
    """(K,) id of each answer token."""
    old_logp_K: Tensor
    """(K,) log-probs recorded when sampling."""
    answer_K: Tensor
    """(K,) index of the answer that each token belongs to, below S."""
    slot_S: Tensor
    """(S,) slot of each answer."""
    row_M: Tensor
    """(M,) row of each marker."""
    column_M: Tensor
    """(M,) position of each marker."""
    slot_M: Tensor
    """(M,) slot of each marker."""
    num_tokens: int
    """Tokens without padding."""


def starts_with(ids: Ids, prefix: Ids) -> bool:
    return len(ids) >= len(prefix) and np.array_equal(ids[: len(prefix)], prefix)


def pack_answers(batch: Batch, agent: str, policy: Policy, *, values: bool = False, history: History = "full") -> list[Packed]:
    """The sequences of one agent: its answers and, with `values`, a marker before each of them.

    A marker's slot counts T + 1 turns; a truncated episode has a marker after its last observation. Raises EngineError for
    completions without token ids and log-probs.
    """
    _, N, T = batch.shape
    n = batch.agents.index(agent)
    packed: list[Packed] = []
    for e, episode in enumerate(batch.episodes):
        current: Packed | None = None
        for t, turn in enumerate(episode.turns):
            answer = turn.completions.get(agent)
            if answer is None or t < episode.own_from:
                continue
            if answer.prompt_ids is None or answer.token_ids is None or answer.logprobs is None:
                raise EngineError(f"{agent}: the engine gave no token ids or log-probs; it can evaluate but not train.")
            if current is None or not starts_with(answer.prompt_ids, current.ids):
                current = Packed(answer.prompt_ids)
                packed.append(current)
            start = len(answer.prompt_ids)
            current.ids = np.concatenate([answer.prompt_ids, answer.token_ids])
            current.answers.append(((e * N + n) * T + t, start, answer.logprobs))
            if values:
                current.markers.append(((e * N + n) * (T + 1) + t, start - 1))
        if values and episode.truncated and current is not None and agent in episode.observations:
            ids = policy.chat.encode(episode.history(agent, history))
            if not starts_with(ids, current.ids):
                current = Packed(ids)
                packed.append(current)
            current.ids = ids
            current.markers.append(((e * N + n) * (T + 1) + len(episode.turns), len(ids) - 1))
    return packed


def pack_readings(
    batch: Batch, critic: Critic, view: Sequence[str], *, state: bool, kind: str, newest_only: bool = False
) -> tuple[list[Packed], int]:
    """The sequences that a critic reads, and the number of histories that had to be cut.

    V: a marker before every turn and after the last turn of a truncated episode (T + 1 slots). Q: a marker after the answers of
    every turn (T slots).

    Args: view: agents whose texts are read; slots are of the first of them that is trained.
    """
    _, N, T = batch.shape
    n = next(batch.agents.index(agent) for agent in view if agent in batch.agents)
    packed: list[Packed] = []
    num_cut = 0
    for e, episode in enumerate(batch.episodes):
        current: Packed | None = None
        for t in range(len(episode.turns) + (kind == "V" and episode.truncated)):
            answers = None if kind == "V" else {a: c.text for a, c in episode.turns[t].completions.items()}
            reading = critic.read(episode, t, view, state=state, newest_only=newest_only, answers=answers)
            num_cut += reading.cut > 0
            if current is None or not starts_with(reading.ids, current.ids):
                current = Packed(reading.ids)
                packed.append(current)
            current.ids = reading.ids
            slot = (e * N + n) * (T + (kind == "V")) + t
            current.markers.append((slot, len(reading.ids) - 1))
    return packed, num_cut


def pack_alternatives(
    batch: Batch, critic: Critic, view: Sequence[str], *, state: bool, newest_only: bool = False
) -> tuple[list[Packed], list[int]]:
    """Sequences for Q with one agent's answer replaced by each of its resampled answers; marker slots are numbered in order.

    Returns the sequences and, for each marker, the slot (T turns) of the answer that was replaced.
    """
    _, N, T = batch.shape
    packed: list[Packed] = []
    slots: list[int] = []
    for e, episode in enumerate(batch.episodes):
        for t, turn in enumerate(episode.turns):
            taken = {agent: completion.text for agent, completion in turn.completions.items()}
            for agent, others in turn.alternatives.items():
                if agent not in view:
                    continue
                for other in others:
                    said = {**taken, agent: other.text}
                    reading = critic.read(episode, t, view, state=state, newest_only=newest_only, answers=said)
                    packed.append(Packed(reading.ids, markers=[(len(slots), len(reading.ids) - 1)]))
                    slots.append((e * N + batch.agents.index(agent)) * T + t)
    return packed, slots


def rows_of(packed: Sequence[Packed], max_tokens: int, *, trees: bool) -> list[Row]:
    """One row per sequence; with `trees`, sequences that begin alike share rows. The given order is kept.

    Siblings share a prompt, and tasks share worked examples. In sorted order a sequence shares most with its neighbour, and
    joins its row by the rule of models/sharing.py. A row has at most `max_tokens`, unless it is one sequence.
    """
    if not trees:
        return [Row.of([sequence]) for sequence in packed]
    place = {id(sequence): number for number, sequence in enumerate(packed)}
    rows: list[list[Packed]] = []
    total = 0
    for sequence in sorted(packed, key=lambda s: s.ids.astype(">u4").tobytes()):
        shared = num_shared(rows[-1][-1].ids, sequence.ids) if rows else 0
        new = len(sequence.ids) - shared
        if rows and joins(total, shared, new, max_tokens):
            rows[-1].append(sequence)
            total += new
        else:
            rows.append([sequence])
            total = len(sequence.ids)
    rows.sort(key=lambda sequences: min(place[id(sequence)] for sequence in sequences))
    return [Row.of(sequences) for sequences in rows]


def micro_batches(
    packed: Sequence[Packed], max_tokens: int, device: torch.device, *, trees: bool = False
) -> Iterator[MicroBatch]:
    """Batches of rows of similar length, each at most `max_tokens` with padding; a longer row goes alone.

    trees: sequences that begin alike may share a row, so that their common tokens are read once; only for models that read
    trees. Rows that are plain sequences are in batches of their own, without a mask.
    """
    everything = sorted(rows_of(packed, max_tokens, trees=trees), key=lambda row: -len(row.ids))
    for rows in [row for row in everything if not row.branches], [row for row in everything if row.branches]:
        while rows:
            count = max(1, max_tokens // max(1, len(rows[0].ids)))
            yield _pad(rows[:count], device)
            rows = rows[count:]


def _pad(rows: Sequence[Row], device: torch.device) -> MicroBatch:
    shape = len(rows), len(rows[0].ids)
    ids_BL, position_BL = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    end_BL = np.full(shape, shape[1], dtype=np.int64)
    row_K, column_K, token_K, logp_K, answer_K = [], [], [], [], []
    slot_S: list[int] = []
    markers: list[tuple[int, int, int]] = []
    for b, row in enumerate(rows):
        length = len(row.ids)
        ids_BL[b, :length], position_BL[b, :length], end_BL[b, :length] = row.ids, row.positions, row.ends
        for sequence, column_L in zip(row.sequences, row.columns, strict=True):
            markers += [(b, column_L[position], slot) for slot, position in sequence.markers]
            for slot, start, logprobs in sequence.answers:
                length = len(logprobs)
                row_K.append(np.full(length, b))
                column_K.append(column_L[start - 1 : start - 1 + length])  # the token before predicts the token
                token_K.append(sequence.ids[start : start + length])
                logp_K.append(logprobs)
                answer_K.append(np.full(length, len(slot_S)))
                slot_S.append(slot)

    def moved(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def joined(parts: list[np.ndarray], dtype: type = np.int64) -> Tensor:
        return moved(np.concatenate([np.zeros(0), *parts]).astype(dtype))

    row_M, column_M, slot_M = (moved(c) for c in np.array(markers, dtype=np.int64).reshape(-1, 3).T)
    return MicroBatch(
        moved(ids_BL),
        Tree(moved(position_BL), moved(end_BL)) if rows[0].branches else None,
        joined(row_K),
        joined(column_K),
        joined(token_K),
        joined(logp_K, np.float32),
        joined(answer_K),
        torch.tensor(slot_S, dtype=torch.int64, device=device),
        row_M,
        column_M,
        slot_M,
        sum(len(row.ids) for row in rows),
    )
