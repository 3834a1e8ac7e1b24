"""Readings: what is counted, by hand; names are stable, numbers finite, and time linear, whatever the texts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from worlds import cpu_seconds_at_most

from collm.errors import ConfigError, TrainingError
from collm.learning.readings import MAX_CHARACTERS, MAX_NUMBERS, Columns, joined, read, resolve

TARGET = "Build LI.\nTarget:\n#..##\n#..#.\n#..##"
BUILD = "Build:\n00.1.\n1..0.\n..2.."


def numbers(text: str, first: str = "Begin.") -> dict[str, float]:
    return {k.removeprefix("number/"): x for k, x in read(first, text).items() if k.startswith("number/")}


def mine(first: str, newest: str) -> dict[str, float]:
    """A reader of the user."""
    return {"length": float(len(newest) - len(first))}


def unmarked(first: str, newest: str):
    return {}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Reward: 0.41", {"reward": 0.41}),
        ("score -0.5, n=2", {"score": -0.5, "n": 2.0}),
        ("Tests passed: 2 of 4.", {"tests passed": 0.5}),
        ("Tests passed: 2/4", {"tests passed": 0.5}),
        ("covered 3 of 12 words", {"covered": 0.25}),
        ("13 of 13 hidden tests passed.\nWrite only yours.", {"hidden tests passed": 1.0}),
        ("Passed 0 of 0", {"passed": 0.0}),
        ('{"score": 7}', {"score": 7.0}),
        ("HP 5. The box is empty again.", {"hp": 5.0}),
        ("Turn 3 of 4. Need: wood 3 stone 1\nSeen: wood 1 at 2,1, wood 2 at 7,1",
         {"turn": 0.75, "need wood": 3.0, "need stone": 1.0, "seen wood": 3.0}),
        ("Target cells: 1,2 3,4\nx 0..11, at 3 4 5, 9 x 9, 3-4", {}),
        ("1. first\n2) second\n3rd builder_0 1.2.3 99999999999999999999", {}),
        ("Build:\n0..\n.1.\n...", {}),
    ],
)  # fmt: skip
def test_labelled_numbers(text: str, found: dict[str, float]) -> None:
    assert numbers(text) == pytest.approx(found)


def test_a_label_has_the_same_name_whatever_stands_around_it() -> None:
    for text in ("Reward: 0.41", "The box is empty.\nReward: 0.41 now.", "- REWARD = 0.41", "Turn 3.\n**Reward**: 0.41"):
        assert numbers(text)["reward"] == 0.41


def test_only_the_first_labels_are_read() -> None:
    names = [chr(97 + i) for i in range(26)]
    found = numbers("\n".join(f"{name} 1" for name in [*names, *names]))
    assert found == dict.fromkeys(names[:MAX_NUMBERS], 2.0)


def test_figure_and_ground() -> None:
    """Of 15 cells of the first block 8 are figure; the newest has 5 figure cells, 3 of them on the first one's.

    Pairs of figure: 00 in the first row, 0 over 1 in the first column, 1 over 0 in the fourth: one of three is alike.
    """
    found = read(TARGET, BUILD)
    blocks = {k.removeprefix("block/"): x for k, x in found.items() if k.startswith("block/")}
    assert blocks == pytest.approx(
        {"covered": 4, "outside": 2, "share covered": 4 / 8, "share outside": 2 / 7, "like neighbours": 1 / 3, "kinds": 3}
    )


def test_the_ground_is_the_character_of_both_blocks() -> None:
    """Also where the figure fills most of either; the end of a line does not touch the next one."""
    found = read("###\n##.\n###", "111\n11.\n..1")
    assert (found["block/covered"], found["block/outside"], found["block/kinds"]) == (6.0, 0.0, 1.0)
    assert read("..#\n#..\n...", "..1\n1..\n...")["block/like neighbours"] == 0.0


def test_a_block_without_a_counterpart_lies_outside() -> None:
    found = read("The cells of I, as x y z: 0 0 0", BUILD)
    assert (found["block/covered"], found["block/outside"], found["block/kinds"]) == (0.0, 6.0, 3.0)


def test_an_episode_that_has_just_begun_has_labelled_numbers_alone() -> None:
    text = f"{TARGET}\nAt most 3 lines."
    assert read(text, text) == {"number/at most": 3.0}


def test_words() -> None:
    found = read("The lion sleeps on warm grass, warm and dry", "covered: lion, Grass and zebra")
    assert found == {"words/repeated": 2 / 4, "words/new": 2.0}


def test_texts_of_several_agents_are_laid_over_each_other() -> None:
    """The union of two own builds reads like the build, and the union of words like all words."""
    one, other = "Build:\n00...\n...0.\n.....", "Build:\n...1.\n1....\n..2.."
    both = read(joined([TARGET, TARGET]), joined([one, other]))
    assert both == read(TARGET, BUILD)
    text = "lions never drink"
    assert read(joined([text, text]), joined(["lions", "drink"]))["words/repeated"] == pytest.approx(2 / 3)


def test_numbers_of_several_agents_are_averaged() -> None:
    assert numbers(joined(["Tests passed: 1 of 4", "Tests passed: 3 of 4"]))["tests passed"] == 0.5
    assert numbers(joined(["HP 4", "HP 4"]))["hp"] == 4.0


def test_an_agent_cannot_write_a_second_view() -> None:
    assert joined(["a\fb", "c"]).count("\f") == 1


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200))
@example("", "\x00" * 50)
@example("1" * 50, "-1.1.1.1.1" * 20)
@example("\f\f", "\f0 of 0\f\n\n\f:::::")
@example("ab 1" * 40, "a: 9 of 0" * 20)
@example("...\n...\n...", "###\n###\n###")
def test_readings_are_finite_and_repeatable_whatever_the_texts(first: str, newest: str) -> None:
    for later in (newest, newest.replace("a", "\n..#\n#.."), joined([first, newest])):
        found = read(first, later)
        assert all(math.isfinite(x) for x in found.values())
        assert len(found) <= MAX_NUMBERS + 8
        assert all(0 <= x <= 1 for name, x in found.items() if "share" in name or "repeated" in name or "like" in name)
        assert read(first, later) == found
        assert all(name.isprintable() or not name.isascii() for name in found)


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    st.lists(
        st.sampled_from(["1", "a", ".", ",", " ", " of ", ":", "\n", "#", "-", "x", "/", "\f", "é", "_"]),
        min_size=1,
        max_size=6,
    )
)
@example(["1,"])
@example(["1"])
@example(["-"])
@example(["ab", " "])
@example(["..#\n"])
@example(["..#\n"] * 3 + ["\f"])
def test_time_is_bounded_on_long_and_hostile_texts(parts: list[str]) -> None:
    """A pattern repeated to two million characters is read as fast as its beginning."""
    text = "".join(parts)
    long = (text * (2_000_000 // len(text) + 1))[:2_000_000]
    with cpu_seconds_at_most(5):
        found = read(long[::-1], long)
    if "\f" not in long:
        assert found == read(long[::-1][:MAX_CHARACTERS], long[:MAX_CHARACTERS])


def test_a_reader_of_the_user() -> None:
    assert resolve("text") is read
    assert resolve(f"{__name__}:mine")("ab", "abc") == {"length": 1.0}
    for name in ("nonsense", "os:system", f"{__name__}:unmarked", "nowhere:f", ""):
        with pytest.raises(ConfigError, match=r"critic\.metrics=.*Write"):
            resolve(name)


def test_columns_keep_their_order_and_their_number() -> None:
    columns = Columns(3)
    columns.add([{"b": 1.0}, {"a": 2.0, "b": 3.0}])
    assert columns([{"a": 2.0, "unknown": 9.0}, {}]).tolist() == [[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    columns.add([{"c": 1.0, "d": 1.0, "a": 1.0}])
    assert columns.names == [b"b", b"a", b"c"]
    assert columns([{"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}]).tolist() == [[2.0, 1.0, 3.0]]


def test_columns_survive_a_checkpoint() -> None:
    columns, again = Columns(4), Columns(4)
    columns.add([{"words/é" * 20: 1.0, "a": 1.0}])
    again.load_state_dict(columns.state_dict())
    reading = {"words/é" * 20: 1.0, "a": 2.0}
    assert again.names == columns.names
    assert torch.equal(again([reading]), columns([reading]))
    assert again([reading]).sum() == 3


def test_columns_refuse_a_number_that_is_not_finite() -> None:
    with pytest.raises(TrainingError, match="reading 'a' is nan"):
        Columns()([{"a": math.nan}])
