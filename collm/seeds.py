"""Independent random streams without state: a seed is a function of its purpose.

No generator is carried from one iteration to the next. An exact resume therefore needs no saved random state, and neither
batching nor the number of workers changes the random numbers of an answer.
"""

from __future__ import annotations

import hashlib
import random

Key = int | str


def derive(*keys: Key) -> int:
    """A 63-bit seed that depends on every key and on their order.

    Example: `derive(run_seed, "episode", iteration, index)`; the answer of one agent at one turn is sampled with
    `derive(episode_seed, agent, turn)`.
    """
    return int.from_bytes(hashlib.blake2b(repr(keys).encode(), digest_size=8).digest(), "big") >> 1


def stream(*keys: Key) -> random.Random:
    """A `random.Random` seeded with `derive(*keys)`."""
    return random.Random(derive(*keys))
