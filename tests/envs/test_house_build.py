"""`house_build` against TASKS.md: limits, every reward part and boundary by hand, houses, hostile answers, and the optimum."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import public_data
from worlds import cpu_seconds_at_most

from collm import check_env, make, seeds
from collm.envs.building.house_build import HouseBuild, limit
from collm.envs.building.houses import (
    SYMBOLS,
    House,
    Rectangle,
    distinct,
    draw_house,
    generated,
    house_of,
    listing,
    read_house,
    rectangles,
)
from collm.envs.gathering.grid import part_of
from collm.errors import ConfigError, EnvError
from collm.tiny.workshop import houses

DATA = "house_build/data.json"
BRICKS, OBSIDIAN, PLANKS = "stone_bricks", "obsidian", "planks"


def row(name, *layers):
    """A row in the public format, from layers of rows of symbols."""
    size = [len(layers[0][0]), len(layers), len(layers[0])]
    listed = [{"y": y, "rows": list(rows)} for y, rows in enumerate(layers)]
    return {"task_id": name, "inventory": dict(SYMBOLS), "target_spec": {"type": "y_layers", "size": size, "layers": listed}}


# Box 3 x 2 x 2, 12 cells: a floor of 6 bricks, one obsidian at (0,1,0), one plank at (2,1,1); 8 filled, 4 air, floor 4/12.
HUT = row("hut", ("BBB", "BBB"), ("OAA", "AAD"))
HUT_ALL = {(x, 0, z): BRICKS for x in range(3) for z in range(2)} | {(0, 1, 0): OBSIDIAN, (2, 1, 1): PLANKS}


def start(house=HUT, seed=0, **options):
    env = HouseBuild(wording="terse", houses=[house], **options)
    env.reset(seed=seed, options={"task": 0})
    return env


def fill(x1, y1, z1, x2, y2, z2, block):
    return f"/fill {x1} {y1} {z1} {x2} {y2} {z2} {block}"


def turn(env, *answers):
    """One turn: (raw reward, info, observations)."""
    observations, rewards, _, _, infos = env.step(dict(zip(env.possible_agents, answers, strict=True)))
    info = infos[env.possible_agents[0]]
    assert set(rewards.values()) == {info["raw_reward"] + env.shift}
    assert info["raw_reward"] == pytest.approx(math.fsum(info["reward_parts"].values()))
    return info["raw_reward"], info, observations


def judge(*answers, house=HUT, **options):
    """(parts, metrics) of one turn."""
    _, info, _ = turn(start(house, agents=len(answers), **options), *answers)
    return info["reward_parts"], info["metrics"]


def reference_build(env):
    """The blueprint's own rectangles, each block's cells dealt out evenly: an answer per builder, one of which kills."""
    number = len(env.possible_agents)
    answers = [["/kill"], *([] for _ in range(number - 1))]
    share = {block: -(-count // number) for block, count in env.house.counts.items()}
    dealt = dict.fromkeys(share, 0)
    for y in range(env.house.size[1]):
        for part in rectangles(env.house.blocks, y):
            for z in range(part.z1, part.z2 + 1):
                x = part.x1
                while x <= part.x2:  # as much of the row as the builder whose turn it is may still fill
                    builder, used = divmod(dealt[part.block], share[part.block])
                    last = min(part.x2, x + share[part.block] - used - 1)
                    answers[builder].append(fill(x, y, z, last, y, z, part.block))
                    dealt[part.block] += last - x + 1
                    x = last + 1
    return ["\n".join(lines) for lines in answers]


# --- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "agents", "expected"),
    [
        (68, 1, 102), (68, 2, 51), (68, 3, 34), (54, 2, 40), (12, 3, 6), (7, 2, 5), (7, 3, 4), (5, 3, 2),
        (2, 1, 3), (2, 2, 1), (2, 3, 1), (1, 1, 1), (1, 2, 1), (3, 2, 2), (4, 2, 3),
    ],
)  # fmt: skip
def test_a_limit_is_an_even_share_and_half_of_one(count, agents, expected):
    assert limit(count, agents) == expected


def test_limits_suffice_together_and_never_alone():
    for agents in range(1, 9):
        for count in range(1, 300):
            assert agents * limit(count, agents) >= count
            assert agents == 1 or count == 1 or limit(count, agents) < count


def test_a_fill_of_the_whole_limit_is_carried_out_and_one_cell_more_is_dropped_whole():
    # Of 6 bricks each of two builders may fill 3 + 1 = 4.
    env = start()
    _, info, _ = turn(env, fill(0, 0, 0, 1, 0, 1, BRICKS), "")
    assert len(env.build) == 4
    assert info["metrics"]["dropped"] == 0
    _, info, _ = turn(env, fill(0, 0, 0, 2, 0, 1, BRICKS), "")
    assert env.build == {}
    assert (info["metrics"]["dropped"], info["metrics"]["rejected"]) == (1, 0)
    _, info, seen = turn(
        env, "\n".join([fill(0, 0, 0, 2, 0, 0, BRICKS), fill(0, 0, 1, 1, 0, 1, BRICKS), fill(0, 0, 1, 0, 0, 1, BRICKS)]), ""
    )
    assert set(env.build) == {(0, 0, 0), (1, 0, 0), (2, 0, 0), (0, 0, 1)}  # 3, then 2 dropped, then 1 that still fits
    assert info["metrics"]["dropped"] == 1
    assert "Your dropped fills: 1." in seen["builder_0"]
    assert "dropped" not in seen["builder_1"]


def test_limits_are_each_builders_and_each_blocks_own():
    env = start()
    both = fill(0, 0, 0, 1, 0, 1, BRICKS)
    _, info, _ = turn(env, "\n".join([both, fill(0, 1, 0, 0, 1, 0, OBSIDIAN), fill(2, 1, 1, 2, 1, 1, PLANKS)]), both)
    assert info["metrics"]["dropped"] == 0
    assert info["metrics"]["written_by_both"] == 4 / 8
    _, info, _ = turn(env, both, "\n".join([both, fill(2, 0, 0, 2, 0, 0, BRICKS)]))  # afresh at each turn
    assert info["metrics"]["dropped"] == 1


def test_every_cell_of_a_fill_counts_and_air_neither_costs_nor_gives_back():
    env = start()
    once = fill(0, 0, 0, 1, 0, 0, BRICKS)
    _, info, _ = turn(env, "\n".join([once, once, once]), "")  # 2 + 2 of 4, over the same two cells
    assert info["metrics"]["dropped"] == 1
    air = fill(0, 0, 0, 2, 1, 1, "air")
    _, info, _ = turn(env, "\n".join([once, once, air, air, air, once]), "")
    assert env.build == {}
    assert (info["metrics"]["dropped"], info["metrics"]["rejected"]) == (1, 0)


# --- the reward ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total", range(3, 10))
@pytest.mark.parametrize(("reward", "weight", "base"), [("match", 0.1, 4 / 12), ("coverage", 0.2, 0.0)])
def test_spiders_cost_by_their_strength_and_at_most_all_hit_points(total, reward, weight, base):
    """Sum 3 -> 3/5 of the damage term, 4 -> 4/5, 5 and more -> all of it, never more."""
    seed = next(seed for seed in range(2000) if sum(start(seed=seed).spiders) == total)
    env = start(seed=seed, reward=reward)
    raw, info, seen = turn(env, "", "")
    share = {3: 0.6, 4: 0.8}.get(total, 1.0)
    assert info["reward_parts"]["damage"] == pytest.approx(-weight * share)
    assert raw == pytest.approx(base - weight * share)
    assert info["metrics"]["hp"] == {3: 2, 4: 1}.get(total, 0)
    assert f"HP {max(0, 5 - total)}." in seen["builder_0"]
    for answers in (("/kill", ""), ("", "/kill"), ("/kill", "- /kill")):  # by anyone, and again each turn
        env = start(seed=seed, reward=reward)
        raw, info, _ = turn(env, *answers)
        assert raw == pytest.approx(base)
        assert (info["metrics"]["hp"], info["metrics"]["rejected"]) == (5, 0)
        assert turn(env, "", "")[1]["metrics"]["hp"] == max(0, 5 - total)


def test_three_spiders_are_drawn_from_the_seed_and_shown():
    drawn = set()
    for seed in range(200):
        env = HouseBuild(wording="terse", houses=[HUT])
        seen, _ = env.reset(seed=seed)
        assert seen == HouseBuild(wording="terse", houses=[HUT]).reset(seed=seed)[0]
        assert len(env.spiders) == 3
        assert f"Spiders hit {' '.join(map(str, env.spiders))} of 5 HP" in seen["builder_0"]
        drawn.add(tuple(env.spiders))
    assert drawn == {(a, b, c) for a in (1, 2, 3) for b in (1, 2, 3) for c in (1, 2, 3)}


@pytest.mark.parametrize(
    ("lines", "match", "covered", "redundant"),
    [
        ([], 4, 0, 0),
        ([fill(0, 0, 0, 1, 0, 1, BRICKS)], 8, 4, 0),  # four right
        ([fill(1, 1, 0, 1, 1, 1, BRICKS)], 2, 0, 2),  # two that should be air
        ([fill(0, 1, 0, 0, 1, 0, BRICKS)], 4, 1, 0),  # the wrong block: covered, but not right
        ([fill(0, 0, 0, 0, 1, 1, BRICKS)], 5, 3, 1),  # two right, one covered by the wrong block, one too many
        ([fill(0, 1, 0, 0, 1, 0, OBSIDIAN), fill(2, 1, 1, 2, 1, 1, PLANKS)], 6, 2, 0),
        ([fill(0, 0, 0, 1, 0, 1, BRICKS), fill(0, 0, 0, 0, 0, 1, "air")], 6, 2, 0),  # two emptied again
    ],
)
def test_what_a_build_is_worth(lines, match, covered, redundant):
    answer = "\n".join(["/kill", *lines])
    parts, metrics = judge(answer, "")
    assert parts == {"match": pytest.approx(match / 12), "damage": 0}
    parts, again = judge(answer, "", reward="coverage")
    expected = {"coverage": 2 * covered / 8, "redundant": -1.5 * redundant / 8, "damage": 0}
    assert parts == pytest.approx(expected)
    assert metrics == pytest.approx({**again, "floor": 4 / 12})
    assert again["floor"] == 0
    assert metrics["iou"] == pytest.approx(covered / (8 + redundant))
    assert (metrics["coverage"], metrics["redundant"]) == (covered / 8, redundant / 8)


def test_an_empty_box_is_worth_the_floor():
    for reward in ("match", "coverage"):
        raw, info, _ = turn(start(reward=reward), "/kill", "")
        assert raw == pytest.approx(info["metrics"]["floor"])


def test_a_full_box_of_one_block():
    # One builder may fill 6 + 3 = 9 bricks: the floor and three of the six cells above, two of which are air in the plan.
    parts, metrics = judge(
        "\n".join(["/kill", fill(0, 0, 0, 2, 0, 1, BRICKS), fill(0, 1, 0, 2, 1, 0, BRICKS)]), reward="coverage"
    )
    assert parts == {"coverage": 2 * 7 / 8, "redundant": -1.5 * 2 / 8, "damage": 0}
    assert metrics["match"] == pytest.approx(1 - 4 / 12)  # wrong: three above, and the plank that is missing


def test_later_builders_overwrite_earlier_ones():
    env = start()
    answers = {"builder_1": fill(0, 0, 0, 0, 0, 1, BRICKS), "builder_0": fill(0, 0, 0, 0, 0, 0, OBSIDIAN)}
    *_, infos = env.step(answers)  # whatever the order in the dict
    assert env.build == {(0, 0, 0): BRICKS, (0, 0, 1): BRICKS}
    assert infos["builder_0"]["metrics"]["written_by_both"] == 1 / 8
    env = start()
    turn(env, fill(0, 0, 0, 0, 0, 1, BRICKS), fill(0, 0, 0, 2, 1, 1, "air"))
    assert env.build == {}


# --- commands ------------------------------------------------------------------------------------------------------------


def test_corners_come_in_any_order_and_reach_the_ends_of_the_box():
    for corners in ((0, 0, 0, 1, 0, 1), (1, 0, 1, 0, 0, 0), (1, 0, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0)):
        env = start()
        turn(env, fill(*corners, BRICKS), "")
        assert set(env.build) == {(x, 0, z) for x in (0, 1) for z in (0, 1)}
    env = start()
    turn(env, fill(2, 1, 1, 2, 1, 1, BRICKS), fill(0, 0, 0, 0, 0, 0, BRICKS))
    assert set(env.build) == {(2, 1, 1), (0, 0, 0)}


@pytest.mark.parametrize(
    "line",
    [
        *(fill(3, 0, 0, 0, 0, 0, BRICKS), fill(0, 2, 0, 0, 0, 0, BRICKS), fill(0, 0, 2, 0, 0, 0, BRICKS)),  # a first corner out
        *(fill(0, 0, 0, 3, 0, 0, BRICKS), fill(0, 0, 0, 0, 2, 0, BRICKS), fill(0, 0, 0, 0, 0, 2, BRICKS)),  # a second one
        *(fill(-1, 0, 0, 0, 0, 0, BRICKS), fill(0, 0, 0, "~1", 0, 0, BRICKS), fill(0, 0, 0, 1.0, 0, 0, BRICKS)),
        *(
            fill(0, 0, 0, 0, 0, 0, "stone_stairs"),
            fill(0, 0, 0, 0, 0, 0, "dirt"),
            fill(0, 0, 0, 0, 0, 0, ""),
        ),  # not in the plan
        *("/fill 0 0 0 0 0 stone_bricks", "/fill 0 0 0 0 0 0 stone_bricks replace", "fill 0 0 0 0 0 0 stone_bricks"),
        *(
            "/setblock 0 0 0 stone_bricks",
            "/kill all",
            "/kill @e[type=spider",
            "/kill @e[type=zombie]",
            "kill",
            "/kill /kill",
            "I build the floor.",
            "/fill " + "0 " * 200,
        ),
        *(fill("9" * 30, 0, 0, 0, 0, 0, BRICKS), fill("\u0661", 0, 0, 0, 0, 0, BRICKS)),
    ],
)
def test_a_line_that_is_no_command_is_rejected_and_counted(line):
    env = start()
    _, info, _ = turn(env, f"{line}\n{fill(1, 0, 1, 1, 0, 1, BRICKS)}", "")
    assert env.build == {(1, 0, 1): BRICKS}
    assert (info["metrics"]["rejected"], info["metrics"]["dropped"], env.killed) == (1, 0, False)


def test_list_marks_and_fences_are_tolerated():
    env = start()
    lines = [
        "```mcfunction",
        "- " + fill(0, 0, 0, 0, 0, 0, BRICKS),
        "2. " + fill(1, 0, 0, 1, 0, 0, f"minecraft:{BRICKS}"),
        "  * /kill @e[type=spider]  ",
        "",
        "```",
    ]
    _, info, _ = turn(env, "\r\n".join(lines), "")
    assert set(env.build) == {(0, 0, 0), (1, 0, 0)}
    assert env.killed
    assert info["metrics"]["rejected"] == 0


@pytest.mark.parametrize(("agents", "allowed"), [(1, 600), (2, 300), (3, 200), (7, 85)])
def test_six_hundred_commands_are_split_evenly(agents, allowed):
    air = fill(0, 0, 0, 0, 0, 0, "air") + "\n"
    for head, rejected, built in ((allowed - 1, 0, 1), (allowed, 1, 0)):
        env = start(agents=agents)
        _, info, _ = turn(env, air * head + fill(1, 0, 0, 1, 0, 0, BRICKS), *[""] * (agents - 1))
        assert (info["metrics"]["rejected"], len(env.build)) == (rejected, built)
    env = start(agents=agents)  # kills are commands, too, dropped fills are not
    one = "\n" + fill(1, 0, 0, 1, 0, 0, BRICKS)
    used = "/kill\n" * (allowed - 1) + fill(0, 0, 0, 2, 1, 1, BRICKS)
    _, info, _ = turn(env, used + one, *[""] * (agents - 1))
    assert (info["metrics"]["rejected"], info["metrics"]["dropped"], len(env.build)) == (0, 1, 1)
    used = "/kill\n" * allowed + fill(0, 0, 0, 2, 1, 1, BRICKS)
    env = start(agents=agents)
    _, info, _ = turn(env, used + one, *[""] * (agents - 1))
    assert (info["metrics"]["rejected"], info["metrics"]["dropped"], len(env.build)) == (2, 0, 0)


# --- turns and texts -----------------------------------------------------------------------------------------------------


def test_the_box_is_empty_at_every_turn():
    env = start()
    turn(env, "one\ntwo\n" + fill(0, 0, 0, 1, 0, 1, BRICKS), "/kill")
    _, info, _ = turn(env, "three", "")
    assert env.build == {}
    assert info["metrics"]["rejected"] == 1
    assert info["metrics"]["match"] == pytest.approx(4 / 12)


def test_match_is_shifted_and_stops_above_nine_tenths():
    env = start()
    one, two = reference_build(env)
    for drop, right, over in ((0, 12, True), (1, 11, True), (2, 10, False)):  # 11/12 = 0.917, 10/12 = 0.833
        env = start()
        _, rewards, *_ = env.step({"builder_0": one.rsplit("\n", drop)[0] if drop else one, "builder_1": two})
        assert rewards["builder_1"] == pytest.approx(right / 12 - 1), drop
        assert (env.agents == []) is over
    env = start()
    env.stop_above = 1.0
    turn(env, one, two)
    assert env.agents  # the mark itself does not stop
    assert (env.shift, env.max_reward) == (-1.0, 1.0)


def test_coverage_is_shifted_by_two_and_never_stops_early():
    env = start(reward="coverage", turns=3)
    for _ in range(3):
        assert env.agents
        raw, _, _ = turn(env, *reference_build(env))
        assert raw == 2.0
    assert env.agents == []
    assert (env.shift, env.stop_above, env.max_reward) == (-2.0, None, 2.0)


def test_the_instruction_says_all_that_a_builder_needs():
    env = HouseBuild(wording="terse", houses=[HUT])
    text = env.reset(seed=3)[0]["builder_1"]
    for phrase in (
        "You are builder_1, one of 2 builders",
        "x 0..2, y 0..1 up, z 0..1",
        "/kill",
        "/fill x1 y1 z1 x2 y2 z2 block",
    ):
        assert phrase in text
    assert "y 0: stone_bricks 0 0 2 1\ny 1: obsidian 0 0 0 0; planks 2 1 2 1\n" in text
    assert "Cells you may fill: stone_bricks 4, obsidian 1, planks 1." in text
    assert "At most 300 lines" in text
    assert text.isascii()
    alone = HouseBuild(wording="terse", houses=[HUT], agents=1).reset(seed=3)[0]["builder_0"]
    assert alone.startswith("You are builder_0. Build this house.\n")
    assert "stone_bricks 9, obsidian 1, planks 1" in alone


def test_feedback_tells_what_its_name_says():
    answers = ("/kill\n" + fill(0, 0, 0, 1, 0, 1, BRICKS), fill(1, 1, 0, 1, 1, 0, PLANKS))
    # Right: 4 bricks, and 3 of 4 air cells. Wrong: two bricks at x = 2, obsidian and plank missing, one plank too many.
    seen = {kind: turn(start(feedback=kind), *answers)[2]["builder_0"] for kind in ("score", "position", "perfect")}
    assert seen["score"] == "Reward: 0.58\nHP 5. The box is empty again."
    assert seen["position"].split("\n")[0] == "Wrong cells: y 0 2, y 1 3"
    assert seen["perfect"].split("\n")[0] == (
        "Wrong cells should be: 2 0 0 stone_bricks, 2 0 1 stone_bricks, 0 1 0 obsidian, 1 1 0 air, 2 1 1 planks"
    )
    env = start(generated_row((4, 3, 4)), feedback="perfect")
    text = turn(env, "", "")[2]["builder_0"].split("\n")[0]
    number = len(env.house.blocks)
    assert len(text.split(",")) == 20
    assert text.endswith(f" and {number - 20} more")
    for kind in ("position", "perfect"):
        env = start(reward="coverage", feedback=kind)
        assert turn(env, *reference_build(env))[2]["builder_0"].startswith("All cells are right.\n")


def test_the_state_shows_plan_and_build():
    env = start()
    turn(env, fill(0, 0, 0, 1, 0, 1, BRICKS), "/kill")
    assert env.state() == (
        "house hut turn 1 of 4 score 0.67 hp 5\nblueprint:\ny 0: stone_bricks 0 0 2 1\ny 1: obsidian 0 0 0 0; planks 2 1 2 1\n"
        "build:\ny 0: stone_bricks 0 0 1 1"
    )


def test_prompts_of_small_houses_are_short():
    """Two turns of a builder who writes every line of a small house, in characters; about three make a token."""
    for task in range(40):
        env = HouseBuild(wording="terse", size=(4, 3, 4), turns=2)
        seen, _ = env.reset(seed=task, options={"task": task})
        answers = reference_build(env)
        again = env.step(dict(zip(env.possible_agents, answers, strict=True)))[0]
        assert len(seen["builder_0"]) + len(again["builder_0"]) < 700
        assert len(seen["builder_0"].split()) < 120 + len(listing(env.house.blocks).split())


# --- the optimum ---------------------------------------------------------------------------------------------------------


def assert_optimum(env):
    raw, info, _ = turn(env, *reference_build(env))
    assert raw == env.max_reward
    assert env.build == env.house.blocks
    metrics = info["metrics"]
    assert (metrics["match"], metrics["iou"], metrics["coverage"], metrics["hp"]) == (1, 1, 1, 5)
    assert (metrics["dropped"], metrics["rejected"], metrics["redundant"], metrics["written_by_both"]) == (0, 0, 0, 0)


@pytest.mark.parametrize("agents", [1, 2, 3, 5])
@pytest.mark.parametrize("reward", ["match", "coverage"])
def test_reference_builds_reach_the_optimum_on_new_houses(agents, reward):
    for size in ((3, 3, 3), (4, 3, 4), (6, 7, 7)):
        for split in ("train", "eval"):
            for task in range(8):
                env = HouseBuild(wording="terse", agents=agents, size=size, reward=reward, split=split)
                env.reset(seed=task, options={"task": task})
                assert_optimum(env)


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("reward", ["match", "coverage"])
def test_reference_builds_reach_the_optimum_on_the_public_houses(agents, reward):
    for public in public_rows():
        assert_optimum(start(public, agents=agents, reward=reward))


def test_one_builder_of_two_cannot_reach_the_optimum():
    """The limits make it a task for a team: the first builder's share alone leaves half undone, and all of it is dropped."""
    env = start()
    one, _ = reference_build(env)
    assert turn(env, one, "")[0] < 1
    everything = "\n".join(fill(*cell, *cell, block) for cell, block in HUT_ALL.items())
    _, info, _ = turn(start(), "/kill\n" + everything, "")
    assert info["metrics"]["dropped"] == 2  # bricks 5 and 6
    assert info["raw_reward"] == pytest.approx(10 / 12)


# --- houses --------------------------------------------------------------------------------------------------------------


def generated_row(size, task=0):
    layers = draw_house(seeds.stream("test", *size, task), size)
    return row("drawn", *layers)


def public_rows():
    return json.loads(public_data(DATA).read_text(encoding="utf-8"))


def blocks_in(text):
    """The cells that a listing names."""
    found = {}
    for y, groups in re.findall(r"^y (\d+): (.+)$", text, re.MULTILINE):
        for group in groups.split("; "):
            block, _, parts = group.partition(" ")
            for part in parts.split(", "):
                x1, z1, x2, z2 = map(int, part.split())
                cells = {(x, int(y), z): block for x in range(x1, x2 + 1) for z in range(z1, z2 + 1)}
                assert not cells.keys() & found.keys()
                found.update(cells)
    return found


def test_rectangles_by_hand():
    ring = read_house("ring", (4, 1, 3), (("OCCO", "CAAC", "CCCC"),))
    white = "white_concrete"
    assert rectangles(ring.blocks, 0) == [
        Rectangle("obsidian", 0, 0, 0, 0), Rectangle(white, 1, 0, 2, 0), Rectangle("obsidian", 3, 0, 3, 0),
        Rectangle(white, 0, 1, 0, 2), Rectangle(white, 3, 1, 3, 2), Rectangle(white, 1, 2, 2, 2),
    ]  # fmt: skip
    assert rectangles(ring.blocks, 1) == []
    assert listing(ring.blocks) == f"y 0: obsidian 0 0 0 0, 3 0 3 0; {white} 1 0 2 0, 0 1 0 2, 3 1 3 2, 1 2 2 2"
    assert ring.counts == {"obsidian": 2, white: 8}


def test_rectangles_cover_every_house_exactly():
    for size in ((3, 3, 3), (4, 3, 4), (6, 7, 7), (16, 16, 16)):
        for task in range(10):
            house = house_of(generated_row(size, task))
            assert blocks_in(listing(house.blocks)) == house.blocks
    for public in public_rows():
        house = house_of(public)
        assert blocks_in(listing(house.blocks)) == house.blocks


def test_splits_of_new_houses_never_coincide():
    for size in ((3, 3, 3), (4, 3, 4), (6, 7, 7)):
        train = [generated("train", size, task) for task in range(512 if size[0] < 6 else 64)]
        held_out = [generated("eval", size, task) for task in range(32)]
        assert not any(house.same_as(other) for house in held_out for other in train)
        assert len(distinct(held_out)) >= 20  # a 3 x 3 x 3 box holds few houses
        assert len(distinct(train[:64])) >= 50
    env, other = make("house_build"), make("house_build", split="eval")
    assert (env.num_tasks, other.num_tasks) == (512, 32)
    assert (env.task_name(5), other.task_name(5)) == ("train-6x7x7-5", "eval-6x7x7-5")


def test_new_houses_are_houses():
    for task in range(200):
        house = generated("train", (6, 7, 7), task)
        heights = {y for _, y, _ in house.blocks}
        assert heights == set(range(max(heights) + 1))
        assert 0.1 < 1 - len(house.blocks) / house.volume < 0.8
        below = [(x, z) for x, y, z in house.blocks if y == 0]
        walls = [(x, z) for x, y, z in house.blocks if y == 1]
        assert set(walls) < set(below)  # the walls stand on the floor and leave room inside
        assert set(house.blocks.values()) <= set(SYMBOLS.values()) - {"air"}
        floor = {block for (_, y, _), block in house.blocks.items() if y == 0}
        assert len(floor) == 1


def test_no_public_house_is_ever_drawn():
    for public in public_rows():
        house = house_of(public)
        floor, corner = house.blocks[1, 0, 1], house.blocks[0, 1, 2]
        assert floor == corner  # floor and wall of one block, which draw_house never makes
    for task in range(200):
        rows = draw_house(seeds.stream("walls", task), (6, 7, 7))
        floor = set("".join(rows[0])) - {"A"}
        cells = [(x, z) for z, line in enumerate(rows[0]) for x, symbol in enumerate(line) if symbol != "A"]
        (x1, z1), (x2, z2) = min(cells), max(cells)
        ring = [rows[1][z][x] for x, z in cells if x in (x1, x2) or z in (z1, z2)]
        wall = max("CBD", key=ring.count)
        assert floor != {wall}


def test_public_data_is_read_unchanged_and_held_out_by_building():
    rows = public_rows()
    for public in rows:
        house = house_of(public)
        counts = {public["inventory"][symbol]: count for symbol, count in public["count"].items() if symbol != "A"}
        assert house.counts == counts
        assert house.size == (6, 7, 7)
        assert house.volume == 294
        env = start(public)
        floor = turn(env, "/kill", "")[0]
        assert floor == pytest.approx(public["count"]["A"] / 294)
        assert 0.29 < floor < 0.50
    houses = distinct(map(house_of, rows))
    assert len(houses) < len(rows)
    train, held_out = (make("house_build", data=str(public_data(DATA)), split=split).houses for split in ("train", "eval"))
    assert [house.name for house in [*train, *held_out]] == [house.name for house in houses]
    assert len(held_out) == 1
    assert not any(house.same_as(other) for house in train for other in held_out)


def write(path, rows):
    path.write_text(json.dumps(rows))
    return str(path)


def test_repeated_houses_are_dropped_and_no_held_out_one_is_trained_on(tmp_path):
    def hut(name, symbol):
        return row(name, (symbol,))

    many = [hut(f"{symbol}{n}", symbol) for symbol in ("B", "BB", "BBB", "O", "OO", "OOO") for n in (0, 1)]
    data = write(tmp_path / "a.json", many)
    names = {split: [h.name for h in make("house_build", data=data, split=split).houses] for split in ("train", "eval")}
    assert names == {"train": ["B0", "BB0", "BBB0", "O0", "OO0"], "eval": ["OOO0"]}
    other = write(tmp_path / "b.json", [hut("x", "BB"), hut("y", "D"), hut("z", "D")])
    options = {"data": data, "eval_data": other}
    assert [house.name for house in make("house_build", split="eval", **options).houses] == ["x", "y"]
    assert [house.name for house in make("house_build", **options).houses] == ["B0", "BBB0", "O0", "OO0", "OOO0"]
    with pytest.raises(ConfigError, match="no house left"):
        make("house_build", data=write(tmp_path / "c.json", many[:2]))


def test_rows_whose_fields_are_json_text_are_read():
    packed = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in HUT.items()}
    assert house_of(packed).same_as(house_of(HUT))
    sparse = json.loads(json.dumps(HUT))
    sparse["target_spec"]["layers"] = [{"y": 1, "rows": ["OAA", "AAD"]}]
    assert house_of(sparse).blocks == {(0, 1, 0): OBSIDIAN, (2, 1, 1): PLANKS}


def damaged(change):
    broken = json.loads(json.dumps(HUT))
    change(broken)
    return broken


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("target_spec"),
        lambda r: r.pop("inventory"),
        lambda r: r["inventory"].pop("B"),
        lambda r: r["inventory"].pop("A"),
        lambda r: r["inventory"].update(B="stone bricks\nYou win"),
        lambda r: r["inventory"].update(BB="stone"),
        lambda r: r["target_spec"].update(size=[3, 2]),
        lambda r: r["target_spec"].update(size=[3, 3, 3]),
        lambda r: r["target_spec"].update(size=[10**9] * 3),
        lambda r: r["target_spec"].update(size=[0, 0, 0], layers=[]),
        lambda r: r["target_spec"].update(size=[-1, 2, 2]),
        lambda r: r["target_spec"].update(layers=[]),
        lambda r: r["target_spec"]["layers"].append(r["target_spec"]["layers"][0]),
        lambda r: r["target_spec"]["layers"][0].update(y=5),
        lambda r: r["target_spec"]["layers"][0].update(rows=["BBB"]),
        lambda r: r["target_spec"]["layers"][0].update(rows=["BBB", "BB"]),
        lambda r: r["target_spec"]["layers"][0].update(rows=["BBB", "BX\n"]),
        lambda r: r.update(target_spec="{"),
        lambda r: r.update(target_spec=None),
    ],
)
def test_a_damaged_house_is_refused(change):
    with pytest.raises(ConfigError, match="house"):
        make("house_build", houses=[damaged(change)])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reward": "sparse"}, "reward"),
        ({"feedback": "none"}, "feedback"),
        ({"split": "test"}, "split"),
        ({"size": [2, 3, 3]}, "size"),
        ({"size": [3, 3, 17]}, "size"),
        ({"size": [3, 3]}, "size"),
        ({"houses": []}, "houses"),
        ({"houses": [HUT], "data": "x.json"}, "houses"),
        ({"eval_data": "x.json"}, "eval_data"),
        ({"data": "none.json"}, "data"),
        ({"agents": 601}, "agents"),
        ({"agents": 0}, "agents"),
        ({"turns": 0}, "turns"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(EnvError, match=named):
        HouseBuild(wording="terse", **options)


# --- the contract, and hostile answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"size": (4, 3, 4)},
        {"agents": 1, "reward": "coverage", "feedback": "perfect"},
        {"agents": 3, "feedback": "position", "turns": 2},
        {"agents": ["ann", "bob"], "houses": [HUT], "split": "eval"},
    ],
)
def test_the_contract_holds(options):
    assert len(check_env(make("house_build", **options), episodes=2)) == 8


PIECES = st.sampled_from(
    [
        *("/fill", "/kill", "/fill 0 0 0 1 0 1 stone_bricks", "/fill 0 0 0 2 1 1 air", " ", "\n", "\r", "\t", "\x00", "\x85"),
        *("0", "1", "2", "99999", "9" * 40, "-1", "~", "\u0663", "planks", "obsidian", "air", "minecraft:", "\ud800", "\u2028"),
        *("-", "1.", "```", "\U0001f600", "<|im_end|>", "{}", "[" * 30, "%s"),
    ]
)
HOSTILE = st.one_of(
    st.text(max_size=200), st.lists(PIECES, max_size=40).map("".join), st.lists(PIECES, max_size=40).map(" ".join)
)


@settings(max_examples=200, deadline=2000, derandomize=True, database=None)
@given(first=HOSTILE, second=HOSTILE, coverage=st.booleans())
@example(first="x" * (1 << 20), second="/fill " * 100_000, coverage=False)
@example(first="- " * (1 << 19), second="\n" * (1 << 20), coverage=True)
@example(first="/fill 0 0 0 2 1 1 air\n" * 50_000, second="1. 1. 1. " * 20, coverage=True)
def test_no_text_breaks_the_world(first, second, coverage):
    env = start(reward="coverage" if coverage else "match", turns=2, feedback="perfect")
    env.stop_above = None
    for _ in range(2):
        raw, info, seen = turn(env, first, second)
        assert -1.5 * 4 / 8 - 0.2 <= raw <= env.max_reward
        assert all(math.isfinite(number) for number in info["metrics"].values())
        assert all(0 <= cell[axis] < (3, 2, 2)[axis] for cell in env.build for axis in range(3))
        assert all(list(env.build.values()).count(block) <= 2 * env.limits[block] for block in env.limits)
        assert 0 <= info["metrics"]["rejected"] <= first.count("\n") + second.count("\n") + 2
        assert all(text.isascii() and len(text) < 1000 for text in seen.values())
        assert isinstance(env.state(), str)


def test_a_megabyte_is_read_in_no_time():
    with cpu_seconds_at_most(2):
        for text in ("/fill " + "1" * (1 << 20), " " * (1 << 20), "-" * (1 << 20), "/fill 0 0 0 0 0 0 " + "a_" * (1 << 19)):
            turn(start(), text, text)


def test_a_fresh_copy_replays_and_an_episode_is_forgotten():
    answers = [("/kill\n" + fill(t % 3, 0, 0, 2, 0, 0, BRICKS), "hm\n" + fill(0, 0, t % 2, 0, 1, 1, BRICKS)) for t in range(4)]
    runs = [[turn(env, *pair) for pair in answers] for env in (start(seed=9), start(seed=9))]
    assert runs[0] == runs[1]
    env = start(seed=9)
    turn(env, *answers[0])
    env.reset(seed=9, options={"task": 0})
    assert (env.build, env.killed, env.rejected) == ({}, False, 0)
    assert [turn(env, *pair) for pair in answers] == runs[0]


# --- poor players --------------------------------------------------------------------------------------------------------


def test_poor_builders_speak_the_format_and_leave_much_undone():
    for reward in ("match", "coverage"):
        shares, rejected = [], 0.0
        for task in range(60):
            rng = seeds.stream("poor", task)
            env = HouseBuild(wording="terse", size=(4, 3, 4), turns=1, reward=reward)
            env.reset(seed=task, options={"task": task})
            raw, info, _ = turn(env, *(houses.fill_boxes(env, agent, rng) for agent in env.agents))
            floor = info["metrics"]["floor"]
            shares.append((raw - floor) / (env.max_reward - floor))
            rejected += info["metrics"]["rejected"]
        assert rejected == 0
        assert 0.1 < sum(shares) / len(shares) < 0.5
        assert max(shares) > 0.5  # something to select
        assert max(shares) < 1


def test_demonstrations_are_played_on_houses_kept_for_pre_training_only():
    symbols = {block: symbol for symbol, block in SYMBOLS.items()}
    texts = set()
    for number in range(150):
        chats = houses.house_build(seeds.stream("demonstration", number))
        assert chats == houses.house_build(seeds.stream("demonstration", number))
        assert 1 <= len(chats) <= 2
        for chat in chats:
            first = chat[0][0]
            texts.add(first)
            width, height, depth = (int(last) + 1 for last in re.findall(r"[xyz] 0\.\.(\d+)", first)[:3])
            blocks = blocks_in(first)
            layers = tuple(
                tuple("".join(symbols[blocks.get((x, y, z), "air")] for x in range(width)) for z in range(depth))
                for y in range(height)
            )
            assert part_of(layers) == "pretraining"
            assert sum(len(seen) + len(said) for seen, said in chat) < 1800
    assert len(texts) > 130


def test_a_house_knows_what_it_is():
    house = house_of(HUT)
    assert isinstance(house, House)
    assert house.blocks == HUT_ALL
    assert house.counts == {BRICKS: 6, OBSIDIAN: 1, PLANKS: 1}
    assert not house.same_as(read_house("other", (3, 2, 2), (("BBB", "BBB"), ("OAA", "AAA"))))
