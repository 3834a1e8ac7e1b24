"""What sequences share: how many tokens they begin with in common, and whether they share a row of an update."""

import numpy as np

from collm.types import Ids

PAIRS_PER_TOKEN = 1024
"""Attention of this many pairs of tokens is taken to cost as much as one more token."""


def joins(total: int, shared: int, new: int, max_tokens: int) -> bool:
    """Whether a sequence joins the row of the sequence before it.

    It does if reading the shared tokens again costs more than the attention between its new tokens and the row, which is
    computed and masked, and if the row then has at most `max_tokens`.

    Args: total: tokens of the row. shared: tokens that the sequence and the one before begin with. new: its other tokens.
    """
    return total + new <= max_tokens and 2 * new * (total + new) <= PAIRS_PER_TOKEN * shared


def num_shared(one: Ids, other: Ids) -> int:
    """Number of tokens that both begin with."""
    length = min(len(one), len(other))
    differs = np.flatnonzero(one[:length] != other[:length])
    return int(differs[0]) if len(differs) else length
