"""What benchmarks/usable.py counts as a usable answer."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
from places import ROOT

from collm.envs.catalogue import EnvSpec


@pytest.fixture(scope="module")
def usable() -> Any:
    spec = importlib.util.spec_from_file_location("usable", ROOT / "benchmarks" / "usable.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["usable"] = module
    spec.loader.exec_module(module)
    return module


def test_half_of_the_parts_may_be_rejected_and_no_more(usable: Any) -> None:
    spec = EnvSpec("str_build", {"strings": ["I"], "eval_strings": ["I"]})
    good, bad = "/setblock 0 0 0 oak_planks", "I would build an I."
    for answer, is_usable in (
        (good, True),
        (f"{good}\n{bad}", True),
        (f"{good}\n{bad}\n{bad}", False),
        (bad, False),
        ("", False),
    ):
        assert usable.judge(spec, 0, 0, "builder_0", answer, []).usable is is_usable


def test_team_mates_answers_are_not_counted_against_an_agent(usable: Any) -> None:
    judged = usable.judge(EnvSpec("agree"), 0, 0, "agent_1", "red", [])
    assert (judged.parts, judged.rejected, judged.usable) == (1, 0, True)
    assert not usable.judge(EnvSpec("agree"), 0, 0, "agent_1", "purple", []).usable


def test_an_answer_whose_every_line_is_an_examples_is_a_copy(usable: Any) -> None:
    shown = ["/setblock 0 0 0 stone\n/setblock 1 1 0 stone"]
    assert usable.copies("/setblock  0 0 0 STONE", "read", shown)
    assert not usable.copies("/setblock 0 0 0 stone\n/setblock 0 4 0 stone", "read", shown)
    assert not usable.copies("", "read", shown)
    assert usable.copies("/setblock 3 4 0 stone", "It must begin with: /setblock, for example: /setblock 3 4 0 stone", [])
    assert not usable.copies("The old man slept.", "The old man slept. Repeat part of this text.", [])
