"""The examples do what they say."""

from __future__ import annotations

import runpy

from places import ROOT

MINIMAL = ROOT / "examples" / "minimal.py"


def test_the_minimal_example_learns_in_sixty_lines() -> None:
    """From uniform play over four colours to agreement; without steps of the optimizer nothing rises."""
    assert len(MINIMAL.read_text(encoding="utf-8").splitlines()) <= 60
    train = runpy.run_path(str(MINIMAL))["train"]
    rewards = train(iterations=10)
    assert rewards[0] < 0.45
    assert sum(rewards[-3:]) / 3 > 0.85
    untrained = train(iterations=4, lr=0.0)
    assert untrained[0] == rewards[0]
    assert max(untrained) < 0.5
