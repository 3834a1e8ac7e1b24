"""Learned effects of lines: what they change in the next observation, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collm.learning import effects as effects_module
from collm.learning.batch import Batch
from collm.learning.effects import BYTES, Effects, laid_out, lines_of, redrawn
from collm.learning.tensors import restore
from collm.models.split import whole_weights
from collm.types import Completion, Episode, Group, Turn

TEAM = ("a", "b")
EMPTY = "Build:\n...\n...\n..."
GOAL = "Goal:\n##.\n##.\n..."


def drawn(text: str, *cells: tuple[int, str]) -> str:
    """The text with characters at numbered cells of its block."""
    layout, codes = laid_out(text)
    codes = codes.copy()
    for place, character in cells:
        codes[place] = ord(character)
    return redrawn(text, layout, codes)


def episode(*turns: tuple[str, str, str], end: str) -> Episode:
    """Turns of what both read and what a and b answer; `end` is read after the last one."""
    played = []
    for seen, one, other in turns:
        answers = {"a": one, "b": other}
        completions = {agent: Completion(agent, text, (), torch.zeros(0).numpy()) for agent, text in answers.items()}
        played.append(Turn(dict.fromkeys(TEAM, seen), completions, 1.0, 1.0))
    return Episode(0, 0, TEAM, dict.fromkeys(TEAM, end), played, terminated=True)


def batch_of(*episodes: Episode) -> Batch:
    return Batch.of([Group(0, [one]) for one in episodes], TEAM)


def start(one: str, other: str, end: str) -> Episode:
    return episode(("Begin.", "", ""), (EMPTY, one, other), end=end)


def shown(effects: Effects, *episodes: Episode, without: str = "a", turn: int = 1) -> list[str]:
    return [o.observations["b"] for (_, t), o in effects.outcomes(batch_of(*episodes), without).items() if t == turn]


TWO = [
    start("put 0", "put 4", drawn(EMPTY, (0, "x"), (4, "x"))),
    start("put 0", "put 8", drawn(EMPTY, (0, "x"), (8, "x"))),
    start("put 4", "nonsense", drawn(EMPTY, (4, "x"))),
    start("put 8", "put 8\nput 4", drawn(EMPTY, (8, "x"), (4, "x"))),
]


def test_a_line_has_the_effect_that_follows_it_and_not_other_lines() -> None:
    effects = Effects(TEAM)
    assert shown(effects, TWO[0]) == [EMPTY]  # nothing is known yet
    effects.learn(batch_of(*TWO, *TWO))
    assert shown(effects, *TWO) == [drawn(EMPTY, (4, "x")), drawn(EMPTY, (8, "x")), EMPTY, drawn(EMPTY, (4, "x"), (8, "x"))]
    assert shown(effects, *TWO, without="b") == [drawn(EMPTY, (p, "x")) for p in (0, 0, 4, 8)]


def test_the_own_answer_is_not_read() -> None:
    effects = Effects(TEAM)
    effects.learn(batch_of(*TWO))
    one, other = start("put 0", "put 8", EMPTY), start("put 4\nput 8", "put 8", drawn(EMPTY, (4, "x")))
    assert shown(effects, one) == shown(effects, other)


def test_a_cell_that_was_there_already_is_not_counted_against_a_line() -> None:
    """Ten times the cell is filled before: the line's one effect on an empty cell is still its effect."""
    effects = Effects(TEAM)
    full = drawn(EMPTY, (4, "x"))
    idle = [episode(("Begin.", "", ""), (full, "put 4", ""), end=full) for _ in range(10)]
    effects.learn(batch_of(*idle, *[start("put 4", "", full)] * 2, *[start("", "", EMPTY)] * 4))
    assert shown(effects, start("", "put 4", EMPTY)) == [full]


def test_without_blocks_of_one_shape_nothing_is_known() -> None:
    effects = Effects(TEAM)
    plain = episode(("Begin.", "red", "blue"), ("Again.", "red", "blue"), end="End.")
    effects.learn(batch_of(plain))
    assert effects.outcomes(batch_of(plain), "a") == {}
    wider = episode(("Begin.", "", ""), (EMPTY, "put 0", ""), end="Build:\nx...\n....\n....")
    effects.learn(batch_of(wider))
    assert shown(effects, start("", "put 0", EMPTY)) == [EMPTY]


@pytest.mark.parametrize("begins", [GOAL, EMPTY])
def test_the_first_observation_may_draw_the_goal_or_the_state(begins: str) -> None:
    """After the first turn the build is empty but for two cells, so that a goal is replaced by an empty build."""
    effects = Effects(TEAM)
    after = [drawn(EMPTY, (place, "x"), (place + 1, "x")) for place in (0, 4, 7)]
    goals = [episode((begins, f"put {n}", ""), end=text) for n, text in enumerate(after)] * 3
    effects.learn(batch_of(*goals))
    (found,) = shown(effects, episode((begins, "", "put 1"), end=""), turn=0)
    assert found.splitlines()[1:] == after[1].splitlines()[1:]
    assert found.splitlines()[0] == begins.splitlines()[0]


def test_memory_is_bounded_and_frequent_lines_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects_module, "LINES", 8)
    monkeypatch.setattr(effects_module, "CELLS", 4)
    effects = Effects(TEAM)
    for number in range(6):
        noise = [start("put 4", f"noise {number} {n}", drawn(EMPTY, (4, "x"), (n, "y"))) for n in (0, 1, 2, 3, 5, 6)]
        effects.learn(batch_of(*noise))
    table = effects.observers[0]
    assert table.hits_LK.shape == (8, 4)
    assert b"put 4" in table.known()
    assert len(table.known()) == 8
    assert (table.cells_K4[:, 0] >= 0).sum() == 4
    effects.learn(batch_of(*[start("put 8", "", drawn(EMPTY, (8, "x")))] * 3))
    assert b"put 8" in table.known(), "a line said three times takes the place of one said once"


def test_a_checkpoint_holds_all_of_it() -> None:
    effects, again = Effects(TEAM), Effects(TEAM)
    effects.learn(batch_of(*TWO))
    restore(again.observers, whole_weights(effects.observers))
    effects.learn(batch_of(*TWO))
    again.learn(batch_of(*TWO))
    for name, tensor in whole_weights(effects.observers).items():
        assert torch.equal(tensor, whole_weights(again.observers)[name])
    assert shown(effects, *TWO) == shown(again, *TWO)


def test_lines_are_compared_without_surrounding_blanks_and_to_a_length() -> None:
    assert lines_of(["  a b \n\n", "c\r\nd"]) == [b"a b", b"c", b"d"]
    assert [len(line) for line in lines_of(["x" * 100, "ä" * 100])] == [BYTES, BYTES]


def test_a_text_is_redrawn_where_its_blocks_are() -> None:
    text = f"{GOAL}\nWords here.\n{EMPTY}\nThe end"
    layout, cells = laid_out(text)
    assert layout == ((3, 3), (3, 3))
    assert redrawn(text, layout, cells) == text
    other = np.where(cells == ord("."), ord("~"), cells).astype(np.int32)
    assert redrawn(text, layout, other) == text.replace("...", "~~~").replace("##.", "##~")
