"""Tests of minutes begin first, each on another worker."""

from __future__ import annotations

import pytest
from order import LONGEST_FIRST, dealt


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
@pytest.mark.parametrize("others", [0, 5, 100])
def test_each_worker_begins_with_a_part_of_the_longest(workers, others):
    names = [*(f"test_{number}" for number in range(others)), *LONGEST_FIRST]
    found = dealt(names, names, workers)
    assert sorted(found) == sorted(names)
    if others < 100:
        return
    shares, left = [], list(found)
    for worker in range(workers):  # as `--dist worksteal` cuts them
        size = len(left) // (workers - worker)
        shares.append(left[:size])
        left = left[size:]
    assert [share[0] for share in shares] == list(LONGEST_FIRST[:workers])
    assert all(not set(share[len(LONGEST_FIRST) // workers + 1 :]) & set(LONGEST_FIRST) for share in shares)
