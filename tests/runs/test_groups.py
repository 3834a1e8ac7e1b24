"""Episodes that a checkpoint holds come back to the bit."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest

from collm.runs.groups import GROUPS, plain, read
from collm.types import Completion, Counterfactual, Episode, Group, Message, Turn


def same(one: Any, other: Any) -> bool:
    """Equal values of equal types, arrays included."""
    if type(one) is not type(other):
        return False
    if is_dataclass(one):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=True)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or one != one


def answer(agent: str, text: str) -> Completion:
    ids = np.array([5, 9, 71], dtype=np.int32)
    logprobs = np.array([-1.3862944, -0.1, -1e-8], dtype=np.float32)
    return Completion(agent, text, ids, ids[1:], logprobs, "length", written="<think>\n</think>red")


GROUP = Group(
    3,
    [
        Episode(
            task=3,
            seed=2**63 + 1,
            agents=("a", "b"),
            observations={"a": "Next.\n", "b": "\u2028"},
            turns=[
                Turn(
                    observations={"a": "Name a colour.", "b": "Name one."},
                    completions={"a": answer("a", "red"), "b": Completion("b", "", finish_reason="error", error="none came")},
                    reward=0.1 + 0.2,
                    raw_reward=1e-300,
                    parts={"match": float("nan"), "bonus": float("inf")},
                    state="held",
                    metrics={"iou": 1 / 3},
                    messages={"a": answer("a", "listen")},
                    alternatives={"a": [answer("a", "blue"), answer("a", "green")]},
                    no_op={"a": Counterfactual(-0.5, 0.5, {"iou": 0.0}, {"a": "Nothing."}, matches=False)},
                )
            ],
            truncated=True,
            path=(0, 2),
            own_from=1,
            examples={"a": (Message("user", "x"), Message("assistant", "y", np.array([7], dtype=np.int32)))},
        ),
        Episode(task=3, seed=1, agents=("a",), failure="the sandbox did not answer"),
    ],
)


def test_groups_come_back_to_the_bit() -> None:
    assert not same(GROUP, Group(3, GROUP.episodes[:1]))
    assert same([GROUP], read(GROUPS, json.loads(json.dumps(plain([GROUP])))))


def test_values_of_another_shape_are_refused() -> None:
    with pytest.raises(KeyError, match="episodes"):
        read(GROUPS, [{"task": 3}])
