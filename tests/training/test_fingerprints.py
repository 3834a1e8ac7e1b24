"""A refactor changes no bit: small runs of every kind give the recorded weights, episodes and metrics."""

from __future__ import annotations

import copy
import json

import pytest
from fingerprints import CONFIGURATIONS, RECORDED, differences, fingerprint, fingerprints, machine

RECORDS = json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_weights_episodes_and_metrics_are_the_recorded_ones() -> None:
    if machine() not in RECORDS:
        pytest.skip(
            f"no fingerprints recorded on {machine()}; compare with a commit: python tests/fingerprints.py --against COMMIT"
        )
    assert differences(RECORDS[machine()], fingerprints()) == []


def test_every_configuration_is_recorded() -> None:
    """On some machine: one that came later than a configuration has all of them."""
    assert set().union(*RECORDS.values()) == set(CONFIGURATIONS)


def test_another_rate_gives_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {"magrpo": fingerprint("magrpo")}
    assert differences(before, {"magrpo": fingerprint("magrpo")}) == []
    changed = copy.deepcopy(CONFIGURATIONS["magrpo"])
    monkeypatch.setitem(CONFIGURATIONS, "magrpo", {**changed, "learner": {"lr": 1.0001e-3}})
    assert "magrpo: weights" in differences(before, {"magrpo": fingerprint("magrpo")})
