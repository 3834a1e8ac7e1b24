"""`str_build` against TASKS.md: every reward part and boundary by hand, and hostile answers."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import public_data
from worlds import cpu_seconds_at_most

from collm import make
from collm.envs.building import font
from collm.envs.building.str_build import PALETTES, REFERENCE, StrBuild, read_strings
from collm.errors import ConfigError, EnvError

DATA = "str_build/data.csv"
OAK, STONE, CONCRETE, OBSIDIAN = "oak_planks", "stone", "white_concrete", "obsidian"
# I: the rows y = 4 and y = 0 are full, the column x = 2 joins them; 13 cells, background 25 - 13 = 12.
LETTER_I = {(x, y) for x in range(5) for y in (0, 4)} | {(2, y) for y in range(5)}


def commands(blocks):
    """{(x, y): block} as an answer."""
    return "\n".join(f"/setblock {x} {y} 0 {block}" for (x, y), block in blocks.items())


def start(word="I", **options):
    env = StrBuild(wording="terse", strings=[word], **options)
    env.reset(seed=0, options={"task": 0})
    return env


def turn(env, *answers):
    """One turn: (reward, info, observations)."""
    observations, rewards, _, _, infos = env.step(dict(zip(env.possible_agents, answers, strict=True)))
    assert len(set(rewards.values())) == 1
    return rewards["builder_0"], infos["builder_0"], observations


def judge(word, *answers, **options):
    """Raw reward, parts and metrics of one turn in a fresh world."""
    reward, info, _ = turn(start(word, agents=len(answers), **options), *answers)
    assert reward == pytest.approx(info["raw_reward"] - 2.0)
    assert info["raw_reward"] == pytest.approx(math.fsum(info["reward_parts"].values()))
    return info["raw_reward"], info["reward_parts"], info["metrics"]


def chessboard(word, palettes):
    """An optimal plan: no neighbours of one block, every block in use (the least used one that fits); an answer per builder."""
    blocks = [block for palette in palettes for block in palette]
    build: dict[tuple[int, int], str] = {}
    for x, y in sorted(font.cells(word)):
        near = {build.get(cell) for cell in ((x - 1, y), (x, y - 1))}
        fits = [blocks[(x + y) % 2]] if len(blocks) == 2 else [block for block in blocks if block not in near]
        build[x, y] = min(fits, key=list(build.values()).count)
    return [commands({cell: block for cell, block in build.items() if block in palette}) for palette in palettes]


def two_builders(word):
    """The plan in the docstring: each builder takes one colour of a chessboard and alternates its two blocks over it."""
    plans = [{}, {}]
    for x, y in sorted(font.cells(word)):
        side = (x + y) % 2
        plans[side][x, y] = PALETTES[side][len(plans[side]) % 2]
    return [commands(plan) for plan in plans]


# --- the font ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "count"),
    [("I", 13), ("C", 11), ("M", 13), ("L", 9), ("MC", 24), ("CM", 24), ("LI", 22), ("LLM", 31), ("ICML", 46), ("CLIM", 46)],
)
def test_cell_counts_of_the_reference_words(word, count):
    assert len(font.cells(word)) == count


def test_widths_and_glyphs():
    assert [font.width("A" * n) for n in (1, 2, 3, 4)] == [5, 12, 19, 26]
    assert font.cells("I") == LETTER_I
    assert font.cells("L") == {(0, y) for y in range(5)} | {(x, 0) for x in range(5)}  # upright: the foot is at y = 0
    assert font.cells("C") == {(x, y) for x in range(1, 5) for y in (0, 4)} | {(0, y) for y in (1, 2, 3)}
    assert font.cells("M") == {(x, y) for x in (0, 4) for y in range(5)} | {(1, 3), (3, 3), (2, 2)}
    assert font.cells("LI") == font.cells("L") | {(x + 7, y) for x, y in LETTER_I}
    assert len(font.GLYPHS) == 26
    assert len({rows for rows in font.GLYPHS.values()}) == 26  # no two letters look the same
    for letter, rows in font.GLYPHS.items():
        assert all(re.fullmatch("[01]{5}", row) for row in rows), letter
        assert len(rows) == 5
        assert 7 <= len(font.cells(letter)) <= 16  # Y has the fewest, Q and B the most or nearly so


def test_words_that_cannot_be_built_are_refused():
    for word in ("", "a1", "É", "A B", "I\n!"):
        with pytest.raises(ConfigError):
            make("str_build", strings=[word])
    assert make("str_build", strings=[" icml "]).words == ["ICML"]


# --- the optimum ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [*REFERENCE["train"], *REFERENCE["eval"]])
def test_a_chessboard_build_reaches_the_optimum(word):
    for answers in (two_builders(word), chessboard(word, PALETTES[:2])):
        raw, parts, metrics = judge(word, *answers)
        assert raw == 2.0
        assert parts == {"coverage": 2.0, "extra": 0.0, "adjacency": 0.0, "missing_blocks": 0.0}
        assert metrics["iou"] == metrics["coverage"] == 1.0
        assert (metrics["extra"], metrics["rejected"], metrics["written_by_both"]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("number", range(1, 9))
def test_any_number_of_builders_can_reach_the_optimum(number):
    raw, _, metrics = judge("ICML", *chessboard("ICML", PALETTES[:number]))
    assert raw == 2.0
    assert metrics["missing_blocks"] == 0
    env = start("ICML", agents=number)
    assert env.possible_agents == [f"builder_{n}" for n in range(number)]
    assert env.palettes["builder_0"] == (OAK, STONE)
    if number > 1:
        assert env.palettes["builder_1"] == (CONCRETE, OBSIDIAN)
    blocks = [block for palette in env.palettes.values() for block in palette]
    assert len(set(blocks)) == 2 * number


def test_more_builders_than_palettes_are_refused():
    with pytest.raises(ConfigError, match="agents"):
        make("str_build", agents=9)


# --- reward parts by hand ------------------------------------------------------------------------------------------------


def test_an_empty_build():
    # No coverage, no pairs; both builders miss their palettes: -0.5.
    raw, parts, metrics = judge("I", "", "")
    assert raw == -0.5
    assert parts == {"coverage": 0.0, "extra": 0.0, "adjacency": 0.0, "missing_blocks": -0.5}
    assert (metrics["iou"], metrics["rejected"], metrics["missing_blocks"]) == (0.0, 0.0, 2.0)


def test_one_builder_fills_all_with_one_block():
    # Coverage 2, every pair alike: -1; builder_0 lacks stone, builder_1 both blocks: -0.25 each.
    raw, parts, _ = judge("I", commands(dict.fromkeys(LETTER_I, OAK)), "")
    assert parts == {"coverage": 2.0, "extra": 0.0, "adjacency": -1.0, "missing_blocks": -0.5}
    assert raw == 0.5


def test_coverage_counts_cells_filled_with_anything():
    # Three of 13 cells, far apart, with three different blocks; builder_1 lacks obsidian: -0.25.
    raw, parts, metrics = judge("I", f"/setblock 0 4 0 {OAK}\n/setblock 2 2 0 {STONE}", f"/setblock 4 0 0 {CONCRETE}")
    assert parts["coverage"] == pytest.approx(6 / 13)
    assert parts["missing_blocks"] == -0.25
    assert raw == pytest.approx(6 / 13 - 0.25)
    assert metrics["iou"] == pytest.approx(3 / 13)


def test_extra_cells_cost_by_background():
    # Three of the 12 background cells of I: -1.5 * 3/12. IoU: 1 covered / (13 + 3).
    extra = {(0, 1): OAK, (1, 2): STONE, (4, 3): OAK}
    _, parts, metrics = judge("I", commands(extra), f"/setblock 2 0 0 {CONCRETE}")
    assert parts["extra"] == pytest.approx(-0.375)
    assert metrics["extra"] == 3
    assert metrics["iou"] == pytest.approx(1 / 16)
    everything = dict.fromkeys(itertools.product(range(5), range(5)), OAK)
    _, parts, metrics = judge("I", commands(everything), "")
    assert parts["extra"] == -1.5
    assert parts["coverage"] == 2.0
    assert metrics["iou"] == pytest.approx(13 / 25)


def test_adjacency_is_the_share_of_touching_pairs():
    # (0,4) oak - (1,4) oak - (2,4) stone - (2,3) stone - and (4,0) alone. Pairs: oak-oak, oak-stone, stone-stone: 2/3.
    build = {(0, 4): OAK, (1, 4): OAK, (2, 4): STONE, (2, 3): STONE, (4, 0): OAK}
    _, parts, metrics = judge("I", commands(build), "")
    assert parts["adjacency"] == pytest.approx(-2 / 3)
    assert metrics["adjacency"] == pytest.approx(2 / 3)
    # Diagonals do not touch; the end of a row does not touch the next row's start.
    _, parts, _ = judge("I", commands({(0, 0): OAK, (1, 1): OAK, (4, 1): OAK, (0, 2): OAK}), "")
    assert parts["adjacency"] == 0.0
    # Extra cells count among the pairs, too, and so do two builders' blocks: (1,0)-(1,1) alike, (1,1)-(1,2) not.
    _, parts, _ = judge("I", commands({(1, 0): OAK, (1, 1): OAK}), f"/setblock 1 2 0 {CONCRETE}")
    assert parts["adjacency"] == -0.5


@pytest.mark.parametrize(
    ("first", "second", "missing"),
    [
        ((OAK, STONE), (CONCRETE, OBSIDIAN), 0),
        ((OAK, STONE), (CONCRETE,), 1),
        ((OAK,), (CONCRETE, OBSIDIAN), 1),
        ((OAK,), (OBSIDIAN,), 2),
        ((), (CONCRETE, OBSIDIAN), 1),
        ((OAK, STONE), (), 1),
    ],
)
def test_a_missing_block_costs_its_builder_a_quarter(first, second, missing):
    left = commands({(index, 4): block for index, block in enumerate(first)})
    right = commands({(index, 0): block for index, block in enumerate(second)})
    _, parts, metrics = judge("I", left, right)
    assert parts["missing_blocks"] == -0.25 * missing
    assert metrics["missing_blocks"] == missing


def test_later_builders_overwrite_earlier_ones():
    env = start("I")
    answers = {"builder_1": f"/setblock 0 0 0 {OBSIDIAN}", "builder_0": f"/setblock 0 0 0 {OAK}\n/setblock 1 0 0 {STONE}"}
    *_, infos = env.step(answers)  # whatever the order in the dict, builder_1 comes after builder_0
    assert env.build == {(0, 0): OBSIDIAN, (1, 0): STONE}
    assert infos["builder_0"]["metrics"]["missing_blocks"] == 2  # oak is no longer in the final world
    assert infos["builder_0"]["metrics"]["written_by_both"] == pytest.approx(1 / 13)


def test_later_lines_overwrite_earlier_ones():
    env = start("I")
    turn(env, f"/setblock 0 0 0 {OAK}\n/setblock 0 0 0 {STONE}", "")
    assert env.build == {(0, 0): STONE}


def test_air_empties_a_cell_of_anybody():
    env = start("I")
    _, info, _ = turn(env, commands({(0, 0): OAK, (1, 0): STONE}), "/setblock 0 0 0 air\n/setblock 4 4 0 air")
    assert env.build == {(1, 0): STONE}
    assert info["metrics"]["rejected"] == 0
    _, parts, _ = judge("I", commands({(0, 0): OAK, (1, 0): STONE}), "/setblock 1 0 0 air")
    assert parts["missing_blocks"] == -0.5  # a block that was taken away is absent


# --- what is a command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "/setblock 5 0 0 stone",  # right of the box
        "/setblock 0 5 0 stone",  # above it
        "/setblock -1 0 0 stone",
        "/setblock 0 -1 0 stone",
        "/setblock 0 0 1 stone",  # behind it
        "/setblock 0 0 -1 stone",
        "/setblock 0 0 0 obsidian",  # a team-mate's
        "/setblock 0 0 0 bricks",
        "/setblock 0 0 0 stones",
        "/setblock 0 0 0",
        "/setblock 0 0 stone",
        "/setblock 0 0 0 stone stone",
        "/setblock 0 0 0 stone # done",
        "/setblock 0.0 0 0 stone",
        "/setblock ~0 ~0 ~0 stone",
        "/setblock +0 0 0 stone",
        "/setblock 0, 0, 0, stone",
        "/setblock \u0660 0 0 stone",  # digits of another script
        "/setblock 99999999999999999999 0 0 stone",
        "/setblock 4294967296 0 0 stone",
        "setblock 0 0 0 stone",
        "/fill 0 0 0 4 4 0 stone",
        "/setblock0 0 0 stone",
        "//setblock 0 0 0 stone",
        "I place /setblock 0 0 0 stone",
        "> /setblock 0 0 0 stone",
        "Here is my plan:",
        "stone",
        "/",
        "\x00",
        "/setblock 0 0 0 stone\x00",
        "/setblock 0 0 0 ston\u0435",  # a Cyrillic letter
    ],
)
def test_anything_else_on_a_line_is_rejected_and_counted(line):
    env = start("I")
    _, info, _ = turn(env, f"/setblock 2 2 0 {OAK}\n{line}\n/setblock 4 4 0 {STONE}", "")
    assert env.build == {(2, 2): OAK, (4, 4): STONE}
    assert info["metrics"]["rejected"] == 1


@pytest.mark.parametrize(
    "answer",
    [
        "/setblock 0 0 0 stone",
        "  /setblock 0 0 0 stone  ",
        "\t/setblock 0 0 0 stone\r\n",
        "\n\n/setblock 0 0 0 stone\n\n",
        "- /setblock 0 0 0 stone",
        "* /setblock 0 0 0 stone",
        "1. /setblock 0 0 0 stone",
        "12) /setblock 0 0 0 stone",
        "```\n/setblock 0 0 0 stone\n```",
        "```mcfunction\n- /setblock 0 0 0 stone\n```",
    ],
)
def test_list_marks_and_code_fences_are_tolerated(answer):
    env = start("I")
    _, info, _ = turn(env, answer, "")
    assert env.build == {(0, 0): STONE}
    assert info["metrics"]["rejected"] == 0


def test_a_command_behind_a_fence_is_not_lost_in_silence():
    """Every line is carried out, or rejected and counted; only a fence is neither."""
    for line in ("```/setblock 0 0 0 stone", "```/setblock 0 0 0 stone```", "``` I shall take the left half ```"):
        env = start("I")
        _, info, _ = turn(env, line, "")
        assert env.build == {(0, 0): STONE} or info["metrics"]["rejected"] == 1, line


def test_the_corners_of_the_box_are_inside():
    for word, right in (("I", 4), ("LI", 11), ("LLM", 18), ("ICML", 25)):
        env = start(word)
        _, info, _ = turn(env, commands({(0, 0): OAK, (right, 4): STONE}), f"/setblock {right + 1} 0 0 {CONCRETE}")
        assert set(env.build) == {(0, 0), (right, 4)}
        assert info["metrics"]["rejected"] == 1


@pytest.mark.parametrize(("number", "limit"), [(1, 300), (2, 150), (3, 100), (4, 75), (7, 42), (8, 37)])
def test_three_hundred_commands_are_split_evenly(number, limit):
    env = start("I", agents=number)
    many = "\n".join([f"/setblock 0 0 0 {OAK}"] * (limit - 1) + [f"/setblock 1 0 0 {OAK}", f"/setblock 2 0 0 {OAK}"])
    _, info, _ = turn(env, many, *[""] * (number - 1))
    assert set(env.build) == {(0, 0), (1, 0)}  # the last allowed one is carried out, the one past the limit is not
    assert info["metrics"]["rejected"] == 1


def test_the_instruction_names_the_limit_palette_box_and_target():
    env = StrBuild(wording="terse", strings=["LI"])
    observations, _ = env.reset(seed=0, options={"task": 0})
    assert env.task_name(env.task) == "LI"
    for agent, (own, other) in (("builder_0", (PALETTES[0], PALETTES[1])), ("builder_1", (PALETTES[1], PALETTES[0]))):
        text = observations[agent]
        assert "150" in text
        assert all(block in text for block in own)
        assert not any(block in text for block in other)
        assert "0..11" in text
        rows = [line for line in text.split("\n") if re.fullmatch("[#.]+", line)]
        assert rows == ["#......#####", "#........#..", "#........#..", "#........#..", "#####..#####"]


# --- turns, ends, worlds -------------------------------------------------------------------------------------------------


def test_a_fresh_world_is_empty_at_every_turn():
    env = start("I", turns=3)
    rewards = [turn(env, commands({(0, 0): OAK}), "")[1] for _ in range(2)]
    assert env.build == {(0, 0): OAK}
    assert rewards[0] == rewards[1]
    _, info, _ = turn(env, "nonsense", "")
    assert env.build == {}
    assert info["raw_reward"] == -0.5
    assert env.agents == []
    env = start("I")
    assert [turn(env, "one\ntwo", "three")[1]["metrics"]["rejected"] for _ in range(3)] == [3, 3, 3]  # of this turn
    assert turn(env, commands({(0, 0): OAK}), commands({(0, 0): CONCRETE}))[1]["metrics"]["written_by_both"] == pytest.approx(
        1 / 13
    )


def test_a_reward_above_the_mark_ends_the_episode_and_is_shifted():
    env = start("I")
    reward, info, _ = turn(env, *two_builders("I"))
    assert (reward, info["raw_reward"]) == (0.0, 2.0)
    assert env.agents == []
    # One cell of 46 short: 2 * 45/46 = 1.957 is still above 1.9. One of 13 short, 1.846, is not.
    for word, over in (("ICML", True), ("I", False)):
        env = start(word)
        reward, info, _ = turn(env, two_builders(word)[0].partition("\n")[2], two_builders(word)[1])
        assert info["raw_reward"] == pytest.approx(2 - 2 / len(font.cells(word)))
        assert reward == pytest.approx(info["raw_reward"] - 2)
        assert (env.agents == []) is over


def test_the_mark_itself_does_not_stop():
    env = start("I", turns=2)
    env.stop_above = 2.0
    turn(env, *two_builders("I"))
    assert env.agents


def test_a_persistent_world_keeps_blocks_and_shows_them_to_all():
    env = start("I", world="persistent", turns=3, feedback="score")
    assert env.limit == 3  # ceil(1.25 * 13 / (2 * 3)) = ceil(2.708)
    _, info, seen = turn(env, commands({(0, 0): OAK}), commands({(4, 4): OBSIDIAN}))
    assert info["metrics"]["coverage"] == pytest.approx(2 / 13)
    expected = ["....3", ".....", ".....", ".....", "0...."]
    for text in seen.values():
        assert [line for line in text.split("\n") if re.fullmatch(r"[.\d]+", line)] == expected
    _, info, _ = turn(env, "", "")
    assert info["metrics"]["coverage"] == pytest.approx(2 / 13)
    _, info, _ = turn(env, "", "/setblock 0 0 0 air\n/setblock 4 4 0 white_concrete")
    assert env.build == {(4, 4): CONCRETE}
    assert info["metrics"]["written_by_both"] == pytest.approx(1 / 13)


def test_the_shown_build_tells_all_blocks_apart():
    """ "every turn shows all agents the current build": with eight builders, sixteen blocks need sixteen symbols."""
    env = start("ICML", agents=8, world="persistent", commands_per_turn=2, feedback="score")
    cells = sorted(font.cells("ICML"))
    answers = [commands({cells[2 * n]: PALETTES[n][0], cells[2 * n + 1]: PALETTES[n][1]}) for n in range(8)]
    _, _, seen = turn(env, *answers)
    rows = [line for line in seen["builder_0"].split("\n") if len(line) == 26 and " " not in line]
    symbols = {rows[4 - y][x] for x, y in cells[:16]}
    assert len(symbols) == 16


# 1.25 * cells / (agents * turns), rounded up. I: 16.25/8 = 2.03. ICML: 57.5/8 = 7.19. MC with 2 x 5: 30/10 = 3 exactly.
@pytest.mark.parametrize(
    ("word", "agents", "turns", "expected"),
    [("I", 2, 4, 3), ("ICML", 2, 4, 8), ("MC", 2, 5, 3), ("LLM", 4, 2, 5), ("L", 8, 4, 1), ("ICML", 1, 1, 58)],
)
def test_commands_per_turn_by_default(word, agents, turns, expected):
    env = start(word, agents=agents, turns=turns, world="persistent")
    assert env.limit == expected
    line = f"/setblock 0 0 0 {OAK}\n"
    _, info, _ = turn(env, line * (expected + 2), *[""] * (agents - 1))
    assert info["metrics"]["rejected"] == 2


def test_the_default_limit_is_enough_to_finish_with_a_quarter_to_spare():
    for word, turns, agents in itertools.product(("L", "LLM", "ICML"), (1, 2, 4, 7), (1, 2, 5)):
        env = start(word, turns=turns, agents=agents, world="persistent")
        placed = turns * agents * env.limit
        assert 1.25 * len(env.target) <= placed < 1.25 * len(env.target) + turns * agents


def test_commands_per_turn_as_set():
    assert start("ICML", world="persistent", commands_per_turn=2).limit == 2
    assert start("ICML", world="persistent", commands_per_turn=1000).limit == 150
    for options in ({"world": "fresh", "commands_per_turn": 2}, {"world": "persistent", "commands_per_turn": 0}):
        with pytest.raises(ConfigError, match="commands_per_turn"):
            make("str_build", **options)


@pytest.mark.parametrize("world", ["fresh", "persistent"])
def test_sparse_pays_the_last_turn_alone_unshifted_without_early_stop(world):
    extra = {"commands_per_turn": 20} if world == "persistent" else {}
    env = start("I", world=world, reward="sparse", turns=3, **extra)
    for _ in range(2):
        reward, info, _ = turn(env, *two_builders("I"))
        assert (reward, info["raw_reward"], info["reward_parts"]) == (0.0, 0.0, {})
        assert env.agents
    reward, info, _ = turn(env, *two_builders("I"))
    assert (reward, info["raw_reward"]) == (2.0, 2.0)
    assert env.agents == []
    env = start("I", world=world, reward="sparse", turns=1, **extra)
    assert turn(env, "", "")[0] == -0.5  # unshifted also when it is bad


def test_a_persistent_dense_world_pays_every_turn_and_stops_early():
    env = start("I", world="persistent", commands_per_turn=20, turns=4)
    reward, _, _ = turn(env, two_builders("I")[0], "")
    assert reward < -2 + 1.2
    reward, _, _ = turn(env, "", two_builders("I")[1])
    assert reward == 0.0
    assert env.agents == []


# --- what agents read between turns --------------------------------------------------------------------------------------


def test_feedback_position_lists_the_target_and_half_of_it():
    _, _, seen = turn(start("I", feedback="position"), commands({(0, 0): OAK}), "")
    for text in seen.values():
        assert {tuple(map(int, m)) for m in re.findall(r"(\d+),(\d+)", text)} == LETTER_I
        assert "half" in text
        assert "Reward" not in text


def test_feedback_perfect_names_wrong_cells_with_an_owner():
    right = {cell: OAK for cell in LETTER_I if cell not in {(0, 0), (1, 0)}}
    _, _, seen = turn(start("I", feedback="perfect"), commands({**right, (4, 3): OAK}), "")
    # Missing (0,0) and (1,0), extra (4,3): owners by (x + y) mod 2: 0, 1, 1.
    for text in seen.values():
        assert set(re.findall(r"(\d+),(\d+):(\w+)", text)) == {
            ("0", "0", "builder_0"),
            ("1", "0", "builder_1"),
            ("4", "3", "builder_1"),
        }
    _, _, seen = turn(start("I", feedback="perfect", agents=3), "", "", "")
    owners = {(int(x), int(y)): owner for x, y, owner in re.findall(r"(\d+),(\d+):(\w+)", seen["builder_0"])}
    assert owners == {(x, y): f"builder_{(x + y) % 3}" for x, y in LETTER_I}


def test_feedback_score_tells_the_last_reward_alone():
    _, info, seen = turn(start("I", feedback="score"), commands({(0, 0): OAK}), "")
    assert info["raw_reward"] == pytest.approx(2 / 13 - 0.5)  # -0.346
    for text in seen.values():
        assert "-0.35" in text
        assert not re.search(r"\d,\d|[#]", text)


@pytest.mark.parametrize("feedback", ["position", "perfect", "score"])
@pytest.mark.parametrize("world", ["fresh", "persistent"])
def test_feedback_repeats_nobodys_answer(feedback, world):
    answers = (f"/setblock 0 0 0 {OAK}\nmy secret plan 4711", f"/setblock 4 4 0 {OBSIDIAN}\nan answer 0815")
    _, _, seen = turn(start("I", feedback=feedback, world=world), *answers)
    for text in seen.values():
        for word in ("setblock", "secret", "4711", "0815", OAK, OBSIDIAN):
            assert word not in text


# --- view = "own" --------------------------------------------------------------------------------------------------------


def test_a_builder_with_its_own_view_sees_its_own_blocks_also_where_they_were_overwritten():
    env = start("I", world="persistent", turns=3, feedback="score", view="own")
    _, info, seen = turn(env, commands({(0, 0): OAK, (2, 2): STONE}), commands({(0, 0): OBSIDIAN, (4, 4): OBSIDIAN}))
    assert env.build == {(0, 0): OBSIDIAN, (2, 2): STONE, (4, 4): OBSIDIAN}
    assert info["metrics"]["coverage"] == pytest.approx(3 / 13)  # metrics are the team's
    assert "3...." in env.state()
    for text, expected in zip(seen.values(), ("..... ..... ..1.. ..... 0....", "....3 ..... ..... ..... 3...."), strict=True):
        assert [line for line in text.split("\n") if re.fullmatch(r"[.\d]+", line)] == expected.split()
    _, _, seen = turn(env, "", "/setblock 2 2 0 air\n/setblock 4 4 0 air")
    assert env.build == {(0, 0): OBSIDIAN}
    assert "..1.." in seen["builder_0"]
    assert "....3" not in seen["builder_1"]


def test_feedback_has_the_scope_of_the_view():
    """builder_0 fills 7 of the 13 cells, those with even x + y, but for (0, 0), and one extra cell."""
    even = {cell: OAK for cell in LETTER_I if sum(cell) % 2 == 0 and cell != (0, 0)}
    for other in ("", commands({(0, 0): OBSIDIAN, (1, 1): OBSIDIAN})):
        _, _, seen = turn(start("I", feedback="perfect", view="own"), commands({**even, (4, 3): OAK}), other)
        assert set(re.findall(r"(\d+),(\d+):(\w+)", seen["builder_0"])) == {("0", "0", "builder_0"), ("4", "3", "builder_0")}
        _, _, seen = turn(start("I", feedback="score", view="own"), commands({(0, 0): OAK}), other)
        assert "Reward: -0.10" in seen["builder_0"]  # 2/13 - 0.25 = -0.096: only its own missing block counts
    sparse = start("I", feedback="score", view="own", reward="sparse", turns=2)
    assert "Reward: 0.00" in turn(sparse, commands({(0, 0): OAK}), "")[2]["builder_0"]
    assert "Reward: -0.10" in turn(sparse, commands({(0, 0): OAK}), "")[2]["builder_0"]


@pytest.mark.parametrize("wording", ["plain", "terse"])
def test_the_own_view_names_no_block_of_another(wording):
    env = StrBuild(wording=wording, strings=["LI"], world="persistent", view="own")
    texts, _ = env.reset(seed=0, options={"task": 0})
    assert "0 oak_planks, 1 stone." in texts["builder_0"]
    assert CONCRETE not in texts["builder_0"]
    assert OBSIDIAN not in texts["builder_0"]


# --- what is hidden ------------------------------------------------------------------------------------------------------


def test_a_blind_first_turn_does_not_tell_the_target():
    """As in the reference, box and palette but not the target: two words of one width read the same."""
    texts = [
        StrBuild(wording="terse", strings=[w], blind_first_turn=True).reset(seed=0, options={"task": 0})[0] for w in ("C", "I")
    ]
    assert not re.search(r"[#]", texts[0]["builder_0"])
    assert texts[0] == texts[1]


def test_after_a_blind_first_turn_the_target_is_told():
    env = start("I", blind_first_turn=True)
    _, _, seen = turn(env, "", "")
    assert {tuple(map(int, m)) for m in re.findall(r"(\d+),(\d+)", seen["builder_0"])} == LETTER_I


def test_the_state_is_the_privileged_view():
    env = start("LI", turns=2)
    turn(env, commands({(0, 0): OAK, (11, 4): STONE}), commands({(5, 2): OBSIDIAN}))
    lines = env.state().split("\n")
    assert "#......#####" in lines
    assert "...........1" in lines
    assert ".....3......" in lines
    assert "0..........." in lines
    assert "LI" in lines[0]


# --- words ---------------------------------------------------------------------------------------------------------------


def test_reference_words_are_the_default():
    assert make("str_build").words == ["I", "C", "M", "L", "MC", "CM", "LI", "LLM"]
    assert make("str_build", split="eval").words == ["ICML", "CLIM"]
    assert make("str_build", strings=["AB"], eval_strings=["CD"]).words == ["AB"]
    assert make("str_build", strings=["AB"], eval_strings=["CD"], split="eval").words == ["CD"]


@pytest.mark.parametrize("lengths", [(2,), (3,), (4,), (2, 3, 4)])
def test_english_words_are_split_without_overlap(lengths):
    train, held_out = font.split_words("train", lengths), font.split_words("eval", lengths)
    assert not set(train) & set(held_out)
    assert len(set(train)) == len(train)
    assert len(set(held_out)) == len(held_out)
    assert sorted(train + held_out) == sorted(w for w in font.english_words() if len(w) in lengths)
    for length in lengths:
        share = sum(len(w) == length for w in held_out) / sum(len(w) == length for w in train + held_out)
        assert share == pytest.approx(0.35, abs=0.02)
    assert make("str_build", strings="english", lengths=list(lengths)).words == train
    assert make("str_build", strings="english", lengths=list(lengths), split="eval").words == held_out


def test_no_word_is_refused_with_the_way_out():
    for options in ({"strings": []}, {"strings": "english", "lengths": [5]}, {"strings": "latin"}):
        with pytest.raises(ConfigError, match="strings"):
            make("str_build", **options)


def test_data_in_the_public_format():
    data = str(public_data(DATA))
    assert sorted(read_strings(data)) == sorted([*REFERENCE["train"], *REFERENCE["eval"]])
    env = make("str_build", data=data)
    for task, word in enumerate(env.words):
        env.reset(seed=0, options={"task": task})
        assert env.target == font.cells(word)


def test_damaged_data_is_refused(tmp_path):
    for name, content in (
        ("empty.csv", b""),
        ("header.csv", b"string,difficulty\n"),
        ("column.csv", b"word\nICML\n"),
        ("binary.csv", b"\xff\xfe\x00\x01"),
        ("letters.csv", b"string\nIC-ML\n"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError):
            make("str_build", data=str(tmp_path / name))
    with pytest.raises(ConfigError, match=r"none\.csv"):
        make("str_build", data=str(tmp_path / "none.csv"))


def test_a_short_row_is_refused_and_not_built_as_the_word_none(tmp_path):
    (tmp_path / "short.csv").write_text("difficulty,string\n1,I\n2\n")
    with pytest.raises(ConfigError):
        make("str_build", data=str(tmp_path / "short.csv"))


# --- hostile answers -----------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *("/setblock", "/setblock 1 1 0 stone", " ", "  ", "\n", "\r", "\t", "\v", "\x00", "\x85", "\u2028", "-", "1.", "```"),
        *("0", "4", "25", "999999", "9" * 40, "\u0663", "stone", "oak_planks", "obsidian", "air", "minecraft:", "\ud800"),
        *("\U0001f600", "<|end|>", "/fill", "{}", "%s"),
    ]
)
HOSTILE = st.one_of(
    st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join), st.lists(PIECES, max_size=40).map(" ".join)
)


@settings(max_examples=300, deadline=2000, derandomize=True, database=None)
@given(first=HOSTILE, second=HOSTILE, persistent=st.booleans())
@example(first="x" * (1 << 20), second="/setblock " * 100_000, persistent=False)
@example(first="- " * (1 << 19), second="\n" * (1 << 20), persistent=True)
@example(first="/setblock 0 0 0 stone\n" * 50_000, second="1. 1. 1. " * 20, persistent=True)
def test_no_text_breaks_the_world(first, second, persistent):
    env = start("LI", world="persistent" if persistent else "fresh", turns=2)
    for _ in range(2):
        reward, info, observations = turn(env, first, second)
        assert math.isfinite(reward)
        assert -1.5 - 1 - 0.5 <= info["raw_reward"] <= 2
        assert set(env.build) <= set(itertools.product(range(12), range(5)))
        assert set(env.build.values()) <= {OAK, STONE, CONCRETE, OBSIDIAN}
        assert 0 <= info["metrics"]["rejected"] <= 2 * (first.count("\n") + second.count("\n") + 2)
        assert 0 <= info["metrics"]["iou"] <= 1
        assert all(isinstance(text, str) and len(text) < 5000 for text in observations.values())
        assert isinstance(env.state(), str)


def test_a_megabyte_is_read_in_no_time():
    with cpu_seconds_at_most(2):
        for text in ("/setblock " + "1" * (1 << 20), " " * (1 << 20), "-" * (1 << 20), "/setblock 0 0 0 " + "a_" * (1 << 19)):
            turn(start("I"), text, text)


def test_an_environment_replays_in_a_fresh_copy():
    for options in ({}, {"world": "persistent"}, {"reward": "sparse", "world": "persistent"}, {"feedback": "perfect"}):
        answers = [(f"/setblock {t} 0 0 {OAK}", f"/setblock 0 {t} 0 {OBSIDIAN}\nhm") for t in range(4)]
        runs = []
        for _ in range(2):
            env = start("LLM", **options)
            runs.append([turn(env, *pair) for pair in answers])
        assert runs[0] == runs[1]


def test_an_environment_forgets_its_last_episode():
    env = StrBuild(wording="terse", strings=["I"], world="persistent", turns=2)
    first = env.reset(seed=0)
    turn(env, commands({(0, 0): OAK}), "junk")
    assert env.reset(seed=0) == first
    assert env.build == {}
    assert turn(env, "", "")[1]["metrics"]["rejected"] == 0


def test_wrong_choices_are_refused_by_name():
    for name in ("world", "reward", "feedback", "split"):
        with pytest.raises(EnvError, match=name):
            StrBuild(wording="terse", **{name: "nonsense"})
