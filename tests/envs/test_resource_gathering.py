"""`resource_gathering` against its rules: every term by hand, fog, facts, hostile answers, and what pairs can reach."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import public_data
from worlds import cpu_seconds_at_most

from collm import check_env, make
from collm.envs.gathering import grid
from collm.envs.gathering.resource_gathering import KINDS, ROLES, ResourceGathering, generated, read_field
from collm.errors import ConfigError, EnvError
from collm.tiny.workshop import gathering

DATA = "resource_gathering/data.json"
GOAL = {"wood": 3, "stone": 3, "iron": 1}
# Nine columns. The wood agent starts at A (0,1), the mineral agent at B (8,1). Seven units are asked for.
# Nearest cell of wood's zone from A: (5,1), two from (7,1), five steps away; of minerals' zone from B: (3,1), five steps.
LONG = (". . . . . . . . .", "A (0,2,1) . . . . . (2,0,0) B", "(0,1,0) . . . . . . . (1,0,0)")


def start(rows=LONG, goal=None, **options):
    env = ResourceGathering(wording="terse", maps=[{"task_id": "made", "rows": list(rows), "goal": goal or GOAL}], **options)
    env.reset(seed=0, options={"task": 0})
    return env


def turn(env, *actions):
    """One turn of dicts (or raw texts): (raw reward, info, observations)."""
    texts = [action if isinstance(action, str) else json.dumps(action) for action in actions]
    observations, rewards, _, _, infos = env.step(dict(zip(env.possible_agents, texts, strict=True)))
    info = infos[env.possible_agents[0]]
    assert set(rewards.values()) == {info["raw_reward"]}  # joint, and no shift
    assert info["raw_reward"] == pytest.approx(math.fsum(info["reward_parts"].values()))
    return info["raw_reward"], info, observations


def path(*cells):
    return {"path": [list(cell) for cell in cells]}


def fact(kind, *cell):
    return {"comm": {"kind": kind, "at": list(cell)}}


def parts(info):
    return {name: value for name, value in info["reward_parts"].items() if value}


# --- the reward ----------------------------------------------------------------------------------------------------------


def test_an_episode_by_hand():
    env = start()
    _, info, _ = turn(env, path((1, 1), (2, 1), (3, 1), (4, 1)), path((7, 1), (6, 1), (5, 1), (4, 1)))
    assert parts(info) == pytest.approx({"toward": 0.05 * 8})  # both one step short of their zones
    _, info, _ = turn(env, path((5, 1), (6, 1)), path((3, 1)))
    # 1 wood of the two at (7,1), 1 stone and 1 iron of (1,1): 3 of 7 units
    assert parts(info) == pytest.approx({"progress": 8 * 3 / 7, "toward": 0.05 * 2, "entry": 0.15 * 2})
    zeros = dict.fromkeys(("success", "facts", "wasted", "rejected"), 0)
    assert info["metrics"] == {**zeros, "progress": pytest.approx(3 / 7), "wood": 1, "stone": 1, "iron": 1}
    _, info, _ = turn(env, path((7, 1)), path((2, 2)))
    assert parts(info) == pytest.approx({"progress": 8 * 2 / 7})  # the second wood of (7,1), the second stone of (1,1)
    assert env.agents
    observations, _, terminations, truncations, infos = env.step({"wood": "", "mineral": ""})  # of (8,2) and (0,2), 2 away
    info = infos["mineral"]
    assert info["raw_reward"] == pytest.approx(8 * 2 / 7 + 7)
    assert parts(info) == pytest.approx({"progress": 8 * 2 / 7, "completion": 7})
    assert info["metrics"]["success"] == 1
    assert info["metrics"]["progress"] == 1
    assert all(terminations.values())
    assert not any(truncations.values())
    assert observations["wood"].startswith("The end. You are at 7,1. Need: nothing")


def test_completion_ends_the_episode_and_is_paid_once():
    env = start(load=3)
    turn(env, path((1, 1), (2, 1), (3, 1), (4, 1)), path((7, 1), (6, 1), (5, 1), (4, 1)))
    reward, info, _ = turn(env, path((5, 1), (6, 1), (7, 1)), path((3, 1), (2, 2)))
    assert reward == pytest.approx(8 + 7 + 2 * (0.05 + 0.15))
    assert info["metrics"]["success"] == 1
    assert env.agents == []


def test_the_last_turn_ends_an_unfinished_episode():
    env = start(turns=2)
    assert turn(env, {}, {})[0] == 0
    _, _, terminations, _, infos = env.step({"wood": "", "mineral": ""})
    assert all(terminations.values())
    assert infos["wood"]["metrics"]["success"] == 0


@pytest.mark.parametrize(
    ("stop", "gathered"),
    [((6, 1), 2), ((5, 1), 2), ((7, 2), 3), ((7, 1), 3), ((6, 2), 3), ((5, 2), 0), ((6, 0), 2), ((5, 0), 0), ((4, 1), 0)],
)
def test_the_harvest_reaches_manhattan_distance_two(stop, gathered):
    """(7,1) holds 2 wood, (8,2) holds 1; the wood agent is set down by steps long enough."""
    env = start(steps=9, load=9)
    way = [(x, 1) for x in range(1, stop[0])] + [stop]
    _, info, _ = turn(env, path(*way), {})
    assert info["metrics"]["wood"] == gathered
    assert info["reward_parts"]["progress"] == pytest.approx(8 * gathered / 7)


def test_only_own_kinds_are_gathered_after_walking_and_only_once():
    env = start((". A (2,1,1) . B", ". . . . ."), goal={"wood": 2, "stone": 1, "iron": 1}, load=2)
    _, info, seen = turn(env, path((0, 1)), path((4, 1)))  # both end 3 away, having passed nothing
    assert info["reward_parts"]["progress"] == 0
    _, info, seen = turn(env, path((1, 1)), {})
    assert info["metrics"]["wood"] == 2
    assert "Seen: stone 1 iron 1 at 2,0" in seen["wood"]  # the cell keeps what is not the wood agent's
    assert turn(env, {}, {})[1]["reward_parts"]["progress"] == 0  # nothing is gathered twice
    _, info, _ = turn(env, {}, path((3, 1)))
    assert info["reward_parts"]["progress"] == pytest.approx(8 * 2 / 4)
    assert info["metrics"]["success"] == 1


@pytest.mark.parametrize(
    ("load", "left"),
    [
        (1, [1, 2, 2, 2, 2]),  # of the nearest cell, (2,1)
        (2, [0, 2, 2, 2, 2]),
        (3, [0, 1, 2, 2, 2]),  # of those two away the upper one, (2,0)
        (5, [0, 0, 1, 2, 2]),  # then the left one of row 1, (1,1)
        (7, [0, 0, 0, 1, 2]),
        (99, [0, 0, 0, 0, 2]),  # (4,3) is three away
    ],
)
def test_how_much_is_gathered_in_a_turn_and_from_where(load, left):
    rows = (". . (2,0,0) . .", ". (2,0,0) (2,0,0) (2,0,0) .", ". . A . .", ". . . . (2,0,0)", "(0,3,1) . . . B")
    env = start(rows, load=load)
    turn(env, {}, {})
    assert [env.left[cell]["wood"] for cell in ((2, 1), (2, 0), (1, 1), (3, 1), (4, 3))] == left


def test_each_kind_is_gathered_up_to_the_load():
    env = start(("A (3,0,0) . . . .", ". . . (0,1,1) (0,2,1) B"))
    assert turn(env, {}, {})[1]["metrics"] | {"success": 0} == turn(start(), {}, {})[1]["metrics"] | {
        "progress": pytest.approx(3 / 7), "wood": 1, "stone": 1, "iron": 1,
    }  # fmt: skip
    assert ResourceGathering(wording="terse", agents=1).load == 3
    assert ResourceGathering(wording="terse", agents=1, load=2).load == 2


def test_standing_still_gathers_what_is_in_reach():
    env = start(("A (1,0,0) . . . .", ". . . . (0,1,1) B"), goal={"wood": 1, "stone": 1, "iron": 1})
    reward, info, _ = turn(env, {}, {})
    assert reward == 15
    assert parts(info) == {"progress": 8, "completion": 7}  # who begins inside its zone is paid for no entry


def test_more_than_the_goal_counts_nothing():
    env = start(("A (9,0,0) . . . . . .", ". . . . (0,9,0) . . B", ". . . . . . . (0,0,1)"), load=9)
    _, info, _ = turn(env, {}, {})
    # 9 wood count as 3; one iron; the stone is 4 away
    assert info["reward_parts"]["progress"] == pytest.approx(8 * 4 / 7)
    assert info["metrics"]["wood"] == 3
    assert info["metrics"]["success"] == 0


# --- steps ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ways", "toward", "entries", "wasted"),
    [
        ([[(1, 1)]], 1, 0, 0),
        ([[(0, 0)]], 0, 0, 1),  # no nearer than before
        ([[(1, 1), (0, 1), (1, 1)]], 1, 0, 2),  # there and back: a step counts once
        ([[(1, 1)], [(0, 1)], [(1, 1)]], 1, 0, 2),  # also in later turns
        ([[(1, 1), (2, 1), (3, 1), (4, 1)], [(5, 1)]], 5, 1, 0),
        ([[(1, 1), (2, 1), (3, 1), (4, 1)], [(5, 1), (6, 1), (6, 0), (7, 0)]], 5, 1, 0),  # inside, steps are free
        ([[(1, 1), (2, 1), (3, 1), (4, 1)], [(5, 1), (4, 1), (5, 1)]], 5, 1, 1),  # out costs, in again earns nothing
        ([[(1, 0), (2, 0), (3, 0), (4, 0)]], 4, 0, 0),
        ([[(9, 9)]], 0, 0, 0),  # a rejected step is no step
    ],
)
def test_steps_toward_the_zone_and_wasted_ones(ways, toward, entries, wasted):
    env = start()
    found = {"toward": 0.0, "entry": 0.0, "wasted": 0.0}
    info = {}
    for way in ways:
        _, info, _ = turn(env, path(*way), {})
        for name in found:
            found[name] += info["reward_parts"][name]
    assert found == pytest.approx({"toward": 0.05 * toward, "entry": 0.15 * entries, "wasted": -0.1 * wasted})
    assert info["metrics"]["wasted"] == wasted


@pytest.mark.parametrize(
    ("way", "stop", "rejected"),
    [
        ([[1, 1], [2, 2], [3, 1], [4, 0]], (4, 0), 0),
        ([[1, 1], [2, 2], [3, 1], [4, 0], [5, 0]], (4, 0), 1),
        ([[0, 1], [1, 1], [2, 2], [3, 1], [4, 0]], (4, 0), 0),  # the own cell may lead
        ([[0, 0], [0, -1]], (0, 0), 1),
        ([[-1, 1]], (0, 1), 1),
        ([[0, 2], [0, 3]], (0, 2), 1),  # below the field
        ([[2, 1]], (0, 1), 1),
        ([[1, 1], [1, 1], [2, 1]], (1, 1), 2),
        ([[1.0, 1]], (0, 1), 1),
        ([[1 << 70, 1]], (0, 1), 1),
        ("east", (0, 1), 1),
        (None, (0, 1), 0),
    ],
)
def test_walking(way, stop, rejected):
    env = start()
    _, info, _ = turn(env, {"path": way}, {})
    assert env.place == {"wood": stop, "mineral": (8, 1)}
    assert info["metrics"]["rejected"] == rejected


# --- fog -----------------------------------------------------------------------------------------------------------------


def test_the_fog_clears_within_two_cells_and_along_the_path():
    rows = [". . . . . . . ."] * 3 + [". . . A . . . (0,3,1)"] + [". . . . . . . ."] * 3 + ["(3,0,0) . . . . . . B"]
    env = start(rows)
    text = env.reset(seed=0)[0]["wood"]
    assert text.split("\n")[-8:] == ["?" * 8, *["?.....??"] * 5, "?" * 8, "?" * 8]
    assert "Turn 1 of 4. You are at 3,3. Need: wood 3 stone 3 iron 1\nSeen: nothing\n" in text
    _, _, seen = turn(env, path((4, 4), (5, 4)), {})
    assert seen["wood"].split("\n")[-8:] == [
        "?" * 8, "?.....??", "?.......", "?......m", "?.......", "?.......", "??......", "?" * 8,
    ]  # fmt: skip
    assert seen["wood"].startswith("Turn 2 of 4. You are at 5,4. Need: wood 3 stone 3 iron 1\nSeen: stone 3 iron 1 at 7,3\n")


def test_what_lies_on_a_cell():
    rows = ("A (1,0,0) (0,2,0)", "B (0,0,3) (0,1,1)", "(0,0,0) (1,1,0) (1,1,1)")
    text = start(rows, goal={"wood": 1, "stone": 1, "iron": 1}).reset(seed=0)[0]["wood"]
    assert text.endswith(
        "Seen: wood 1 at 1,0, stone 2 at 2,0, iron 3 at 1,1, stone 1 iron 1 at 2,1, wood 1 stone 1 at 1,2, "
        "wood 1 stone 1 iron 1 at 2,2\n.ws\n.im\n.xx"
    )


def test_what_one_sees_is_not_shown_to_the_other():
    texts = [turn(start(), way, {})[2]["mineral"] for way in ({}, path((1, 0), (2, 0), (3, 0), (4, 0)))]
    assert texts[0] == texts[1]


# --- facts ---------------------------------------------------------------------------------------------------------------


def test_a_fact_arrives_at_the_next_turn_and_once():
    env = start()
    reward, info, seen = turn(env, fact("stone", 1, 1), {})
    assert seen["mineral"].split("\n")[0] == "wood says: stone at 1,1"
    assert "says" not in seen["wood"]
    assert reward == pytest.approx(0.1)
    assert info["metrics"]["facts"] == 1
    _, _, seen = turn(env, {}, {})
    assert "says" not in seen["mineral"] + seen["wood"]


@pytest.mark.parametrize(
    ("sender", "told", "useful", "delivered"),
    [
        ("wood", ("stone", 1, 1), 1, True),
        ("wood", ("iron", 1, 1), 1, True),
        ("wood", ("stone", 0, 2), 1, True),
        ("wood", ("wood", 1, 1), 0, True),  # not true
        ("wood", ("stone", 2, 1), 0, True),  # not true
        ("wood", ("wood", 7, 1), 0, True),  # true, but a guess, and nobody else gathers wood
        ("mineral", ("wood", 7, 1), 1, True),
        ("mineral", ("wood", 8, 2), 1, True),
        ("mineral", ("stone", 1, 1), 0, True),  # true, but a guess
        ("mineral", ("wood", 9, 1), 0, False),  # off the field
        ("mineral", ("gold", 7, 1), 0, False),
        ("mineral", ("Wood", 7, 1), 0, False),
    ],
)
def test_which_facts_are_useful(sender, told, useful, delivered):
    env = start()
    answers = [fact(*told) if agent == sender else {} for agent in env.possible_agents]
    reward, info, seen = turn(env, *answers)
    other = "mineral" if sender == "wood" else "wood"
    assert reward == pytest.approx(0.1 * useful)
    assert info["metrics"]["facts"] == useful
    assert (f"{sender} says: " in seen[other]) == delivered
    assert info["metrics"]["rejected"] == 1 - delivered


def test_a_fact_is_useful_once():
    env = start()
    assert [turn(env, fact("stone", 1, 1), {})[0] for _ in range(2)] == pytest.approx([0.1, 0])
    assert turn(env, fact("iron", 1, 1), {})[0] == pytest.approx(0.1)  # another kind is another fact


def test_a_fact_about_what_the_other_sees_or_has_just_seen_is_not_new():
    env = start((". . . . .", "A . (0,3,1) . B", "(3,0,0) . . . ."))
    assert turn(env, fact("stone", 2, 1), {})[1]["reward_parts"]["facts"] == 0
    env = start((". . . . . . .", "A (0,3,1) . . . . B", "(3,0,0) . . . . . ."), reach=0)
    walked = turn(env, fact("stone", 1, 1), path((5, 1), (4, 1), (3, 1)))[1]  # seen from (3,1) this very turn
    assert walked["reward_parts"]["facts"] == 0


def test_a_fact_about_what_is_gathered_or_no_longer_needed_is_useless():
    rows = ("A (0,3,0) . . . . . (0,3,0) B", "(0,1,1) . . . . . . . .", "(3,0,0) . . . . . . . .")
    env = start(rows, load=3)
    _, info, _ = turn(env, fact("stone", 1, 0), {})  # the mineral agent gathers its three stones in this turn
    assert info["metrics"]["stone"] == 3
    assert info["metrics"]["facts"] == 0
    assert turn(env, fact("iron", 0, 1), {})[1]["metrics"]["facts"] == 1
    assert turn(env, fact("stone", 1, 0), {})[1]["metrics"]["facts"] == 1  # true, but there is stone enough by now


def test_a_sender_must_have_seen_the_cell_when_it_wrote():
    env = start((". . . . . . . . .", "A . . (0,3,1) . . . . B", "(3,0,0) . . . . . . . ."))
    answer = {**fact("stone", 3, 1), **path((1, 1))}
    assert turn(env, answer, {})[1]["reward_parts"]["facts"] == 0  # it walks into view only now; and now it is told
    env = start((". . . . . . . . .", "A . . (0,3,1) . . . . B", "(3,0,0) . . . . . . . ."))
    turn(env, path((1, 1)), {})
    assert turn(env, fact("stone", 3, 1), {})[1]["reward_parts"]["facts"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    "comm",
    [
        "stone at 1,1",
        ["stone", [1, 1]],
        {"kind": "stone"},
        {"at": [1, 1]},
        {"kind": "stone", "at": [1, 1], "note": "zyzzogeton"},
        {"kind": ["stone"], "at": [1, 1]},
        {"kind": {"a": 1}, "at": [1, 1]},
        {"kind": "stone", "at": "1,1"},
        {"kind": "stone", "at": [1.0, 1.0]},
        {"kind": "stone", "at": [True, True]},
        {"kind": "stone", "at": [1, 1, 1]},
        {"kind": "stone", "at": [-1, 1]},
        {"kind": "stone\nTurn 2 of 4.", "at": [1, 1]},
        {"kind": "<|im_end|>", "at": [1, 1]},
        7,
        True,
    ],
)
def test_anything_but_one_fact_is_rejected(comm):
    _, info, seen = turn(start(), {"comm": comm}, {})
    assert info["metrics"]["rejected"] == 1
    assert info["metrics"]["facts"] == 0
    assert seen["mineral"] == turn(start(), {}, {})[2]["mineral"]


def test_nothing_but_a_fact_crosses():
    secret = "zyzzogeton"
    for answer in (
        f"{secret} {{}} {secret}",
        json.dumps({secret: secret}),
        json.dumps({"comm": secret, "path": secret}),
        json.dumps({"comm": {"kind": secret, "at": [1, 1]}, "path": [[secret, secret]]}),
        json.dumps({"comm": {"kind": "stone", "at": [1, 1], secret: secret}}),
        json.dumps({"comm": {"kind": "stone", "at": [secret, 1]}}),
    ):
        env = start()
        for _ in range(3):
            _, _, seen = turn(env, answer, {})
            assert secret not in seen["wood"] + seen["mineral"] + env.state()


# --- answers as JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "stop", "rejected"),
    [
        ('{"path": [[1,1]]}', (1, 1), 0),
        ('```json\n{"path": [[1,1]]}\n```', (1, 1), 0),
        ('I go. {"path": [[1,1]]} There.', (1, 1), 2),
        ('{"path": [[1,1]], "cmds": []}', (1, 1), 1),
        ('{"path": [[1,1]], "comm": null}', (1, 1), 0),
        ('{"path": [[1,1]], "path": [[1,0]]}', (0, 1), 1),
        ('{"path": [[1,1]]', (0, 1), 1),
        ("", (0, 1), 0),
        ("east", (0, 1), 1),
        ('{"path": ' + "[" * 100_000, (0, 1), 1),
    ],
)
def test_one_json_object_counts(answer, stop, rejected):
    env = start()
    _, info, _ = turn(env, answer, {})
    assert env.place["wood"] == stop
    assert info["metrics"]["rejected"] == rejected


# --- what pairs can reach ------------------------------------------------------------------------------------------------


def within_steps(here, target, steps):
    """The cell on the straight way to `target` that lies `steps` away at most, and the way."""
    way = []
    while here != target and len(way) < steps:
        here = tuple(a + (b > a) - (b < a) for a, b in zip(here, target))
        way.append(here)
    return way


def best_stop(here, sources, need, width, height, steps=4, reach=2):
    """Where to stop for the most units that are needed; where nothing is in range, the way to the nearest source.

    sources: cell -> {kind: amount}; need: kind -> units missing.
    """
    wanted = {cell: {k: n for k, n in kinds.items() if n and need.get(k, 0)} for cell, kinds in sources.items()}
    wanted = {cell: kinds for cell, kinds in wanted.items() if kinds}
    if not wanted:
        return None

    def gain(stop):
        total = dict.fromkeys(need, 0)
        for cell, kinds in wanted.items():
            if grid.distance(cell, stop) <= reach:
                for kind, amount in kinds.items():
                    total[kind] += amount
        return sum(min(total[kind], need[kind]) for kind in need)

    cells = [(x, y) for x in range(width) for y in range(height) if grid.steps_between(here, (x, y)) <= steps]
    best = max(cells, key=lambda stop: (gain(stop), -grid.steps_between(here, stop)))
    if gain(best):
        return best
    return min(wanted, key=lambda cell: grid.steps_between(here, cell))


def knowing(env, agent):
    """What an agent does that reads the privileged `state()`."""
    _, stand, listed, *_ = env.state().split("\n")
    need = needed(env.state().split("\n")[0].split("need ")[1])
    here = tuple(map(int, re.search(rf"\b{agent} (\d+),(\d+)", stand).groups()))
    own = {kind: need[kind] for kind in env.kinds[agent]}
    target = best_stop(here, sources_of(listed), own, env.map.width, env.map.height)
    return path(*(within_steps(here, target, 4) if target else []))


def needed(text):
    return {kind: 0 for kind in KINDS} | {kind: int(number) for kind, number in re.findall(r"(\w+) (\d+)", text)}


def sources_of(listed):
    found = {}
    for amounts, x, y in re.findall(r"((?:\w+ \d+ )+)at (\d+),(\d+)", listed):
        found[int(x), int(y)] = {kind: int(number) for kind, number in re.findall(r"(\w+) (\d+)", amounts)}
    return found


def play(env, task, player):
    """(metrics, turns played, sum of raw rewards)."""
    seen, _ = env.reset(seed=0, options={"task": task})
    total, info = 0.0, {}
    while env.agents:
        answers = {agent: player(env, agent, seen[agent]) for agent in env.agents}
        seen, _, _, _, infos = env.step({agent: json.dumps(answer) for agent, answer in answers.items()})
        info = next(iter(infos.values()))
        total += info["raw_reward"]
    return info["metrics"], env.turn, total


def to_the_others_start(env, agent, seen):
    """All of the goal lies around the two starts: change places; alone, gather at A first."""
    wait = len(env.agents) == 1 and env.turn == 0
    return path(*([] if wait else within_steps(env.place[agent], env.map.starts["wood" in env.kinds[agent]], 4)))


@pytest.mark.parametrize("agents", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 5), (6, 6), (9, 9), (11, 11), (5, 11)])
def test_a_team_that_knows_completes_every_generated_field(size, agents):
    for split, tasks in (("train", range(40)), ("eval", range(32))):
        env = ResourceGathering(wording="terse", agents=agents, size=size, split=split)
        for task in tasks:
            metrics, turns, total = play(env, task, to_the_others_start)
            assert (metrics["success"], metrics["progress"], metrics["rejected"]) == (1, 1, 0)
            assert turns <= 4
            assert 15 - agents * 0.1 * 8 <= total <= 15 + agents * (0.15 + 0.05 * 8)


def test_a_pair_that_knows_completes_every_public_field():
    data = str(public_data(DATA))
    for split in ("train", "eval"):
        env = make("resource_gathering", wording="terse", data=data, split=split)
        assert env.num_tasks == 7
        assert all(f"_{split}_" in env.task_name(task) for task in range(7))
        for task in range(7):
            metrics, turns, total = play(env, task, lambda env, agent, seen: knowing(env, agent))
            assert metrics["success"] == 1
            assert 3 <= turns <= 4
            assert total > 15


class Honest:
    """A gatherer who knows its own texts alone: tells the richest cell it may not have told yet, and goes where it is told."""

    def __init__(self, agent, told):
        self.agent, self.told = agent, told
        self.hearsay, self.said = {}, set()

    def answer(self, text):
        own = ROLES[self.agent != "wood"]
        for kind, x, y in re.findall(r"says: (\w+) at (\d+),(\d+)", text) if self.told else ():
            self.hearsay.setdefault((int(x), int(y)), {})[kind] = 1
        here = tuple(map(int, re.search(r"at (\d+),(\d+)\. Need", text).groups()))
        need = needed(re.search(r"Need: (.*)", text)[1])
        sources = sources_of(re.search(r"Seen: (.*)", text)[1])
        rows = [row for row in text.split("\n") if re.fullmatch(r"[.?wsimx]+", row)]
        width, height = len(rows[0]), len(rows)
        known = {cell: kinds for cell, kinds in self.hearsay.items() if rows[cell[1]][cell[0]] == "?"} | sources
        target = best_stop(here, known, {kind: need[kind] for kind in own}, width, height)
        if target is None:  # nothing is known: the others began on the other side
            target = (width - 1 - here[0], height - 1 - here[1])
        action = path(*within_steps(here, target, 4))
        tell = [
            (-len(kinds), -amount, kind, cell)
            for cell, kinds in sources.items()
            for kind, amount in kinds.items()
            if kind not in own and need[kind] and (kind, cell) not in self.said
        ]
        # first of each kind that is missing, iron before stone; then more of them
        tell.sort(key=lambda item: (sum(kind == item[2] for kind, _ in self.said), item[2] != "iron", *item))
        if tell:
            _, _, kind, cell = tell[0]
            self.said.add((kind, cell))
            action |= fact(kind, *cell)
        return action


def honest_success(told, **options):
    env = ResourceGathering(wording="terse", split="eval", **options)
    found = []
    for task in range(env.num_tasks):
        players = {agent: Honest(agent, told) for agent in env.possible_agents}
        metrics, _, _ = play(env, task, lambda env, agent, seen, players=players: players[agent].answer(seen))
        assert metrics["rejected"] == 0
        found.append(metrics["success"])
    return sum(found) / len(found)


def test_an_honest_pair_succeeds_by_what_it_tells():
    assert honest_success(True) > 0.9
    assert honest_success(False) < honest_success(True) - 0.1


def test_an_honest_pair_on_the_public_fields():
    data = str(public_data(DATA))
    assert honest_success(True, data=data) == 1


def test_poor_players_leave_much_to_learn():
    for size in ((6, 6), (9, 9)):
        rng, total, successes = random.Random(0), 0.0, 0.0
        for task in range(60):
            env = ResourceGathering(wording="terse", size=size)
            metrics, _, reward = play(
                env, task, lambda env, agent, seen, rng=rng: json.loads(whole(gathering.wander, env, agent, rng))
            )
            total, successes = total + reward, successes + metrics["success"]
        assert 0.1 < total / 60 / 15 < 0.55
        assert 0 < successes / 60 < 0.5


def whole(player, env, agent, rng):
    """An answer of a poor player that is not damaged."""
    while True:
        answer = player(env, agent, rng)
        try:
            json.loads(answer)
        except ValueError:
            continue
        return answer


# --- fields --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 5), (6, 6)])
def test_train_and_eval_fields_never_coincide(size):
    fields = {
        part: {repr((f.starts, sorted(f.amounts.items()))) for f in (generated(part, size, task) for task in range(number))}
        for part, number in (("train", 512), ("eval", 32), ("pretraining", 100))
    }
    assert not fields["train"] & fields["eval"]
    assert not (fields["train"] | fields["eval"]) & fields["pretraining"]
    assert len(fields["train"]) > 500
    assert len(fields["eval"]) == 32


def test_generated_fields_look_as_stated():
    for task in range(50):
        field = generated("train", (9, 9), task)
        assert (field.width, field.height) == (9, 9)
        assert field.goal == (3, 3, 1)
        assert grid.steps_between(*field.starts) >= 3
        for kinds, cell in ((KINDS[1:], field.starts[0]), (KINDS[:1], field.starts[1])):
            near = [amounts for other, amounts in field.amounts.items() if grid.distance(other, cell) <= 2]
            for kind in kinds:
                index = KINDS.index(kind)
                assert sum(amounts[index] for amounts in near) >= field.goal[index]
    assert make("resource_gathering").num_tasks == 512
    assert make("resource_gathering", split="eval").num_tasks == 32
    assert make("resource_gathering").task_name(3) == "train-9x9-3"


def test_a_field_is_read():
    field = read_field("a", ("A . (1,0,0)", "B . (0,1,1)"), (1, 1, 1))
    assert (field.width, field.height, field.starts) == (3, 2, ((0, 0), (0, 1)))
    assert field.amounts == {(2, 0): (1, 0, 0), (2, 1): (0, 1, 1)}
    assert field.zone(("wood",), 1) == {(2, 0), (1, 0), (2, 1)}


@pytest.mark.parametrize(
    ("rows", "goal"),
    [
        ([], GOAL),
        (["A . B", ". ."], GOAL),
        (["A . (3,3,1)"], GOAL),  # no B
        (["A A B (3,3,1)"], GOAL),
        (["A B (3,3,0)"], GOAL),  # too little iron
        (["A B (3,3)"], GOAL),
        (["A B (3,-3,1)"], GOAL),
        (["A B x"], GOAL),
        (["A B (3,3,1)"], {"wood": 0}),
        (["A B (3,3,1)"], {"wood": -1, "stone": 2}),
        (["A B (3,3,1)"], {"wood": 1.5}),
        (["A B (3,3,1)"], None),
        ("A B (3,3,1)", GOAL),
        ([1], GOAL),
        (["A B " + ". " * 80], GOAL),
    ],
)
def test_damaged_fields_are_refused_by_name(rows, goal):
    with pytest.raises(EnvError, match="broken"):
        ResourceGathering(wording="terse", maps=[{"task_id": "broken", "rows": rows, "goal": goal}])


def test_data_is_split_by_its_ids_or_in_halves(tmp_path):
    row = {"rows": LONG, "goal": GOAL}
    for names, train, held_out in (
        (["x_eval_1", "x_train_1", "x_eval_2"], ["x_train_1"], ["x_eval_1", "x_eval_2"]),
        (["a", "b", "c"], ["a"], ["b", "c"]),
    ):
        path = tmp_path / f"{names[0]}.json"
        path.write_text(json.dumps([{"task_id": name, **row} for name in names]))
        assert [m.name for m in make("resource_gathering", data=str(path)).maps] == train
        assert [m.name for m in make("resource_gathering", data=str(path), split="eval").maps] == held_out
    with pytest.raises(ConfigError, match=r"none\.json"):
        make("resource_gathering", data=str(tmp_path / "none.json"))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"agents": 0}, "agents"),
        ({"agents": 9}, "agents"),
        ({"size": [4, 6]}, "size"),
        ({"size": [6, 12]}, "size"),
        ({"view": -1}, "view"),
        ({"steps": -1}, "steps"),
        ({"reach": 65}, "reach"),
        ({"load": 0}, "load"),
        ({"turns": 0}, "turns"),
        ({"maps": []}, "maps"),
        ({"eval_data": "x.json"}, "eval_data"),
        ({"split": "test"}, "split"),
    ],
)
def test_bad_options_are_refused_by_name(options, named):
    with pytest.raises(EnvError, match=named):
        ResourceGathering(wording="terse", **options)


# --- the contract --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"agents": 1, "size": [6, 6]}, {"agents": 3, "size": [6, 6]}, {"agents": ["left", "right"], "view": 0}]
)
def test_the_contract(options):
    check_env(make("resource_gathering", **options), episodes=2)


def test_roles_and_starts():
    env = start(agents=3)
    assert env.place == {"wood": (0, 1), "mineral": (8, 1), "wood_2": (0, 1)}
    assert env.kinds == {"wood": ("wood",), "mineral": ("stone", "iron"), "wood_2": ("wood",)}
    env = start(agents=1)
    assert env.place == {"gatherer": (0, 1)}
    assert env.kinds == {"gatherer": KINDS}
    assert start(agents=["left", "right"]).kinds == {"left": ("wood",), "right": ("stone", "iron")}


def test_two_of_one_role_share_what_lies_there():
    env = start(("A (2,0,0) . . . (0,3,1) B",), goal={"wood": 2, "stone": 1, "iron": 1}, agents=3)
    assert turn(env, {}, {}, {})[0] == 15  # one wood each
    assert env.stock["wood"] == 2


def test_three_gatherers_hear_each_other():
    env = start(agents=3)
    _, info, seen = turn(env, fact("stone", 1, 1), fact("wood", 7, 1), fact("stone", 1, 1))
    assert info["metrics"]["facts"] == 2  # the same fact told twice in a turn is new once
    assert seen["wood"].split("\n")[:2] == ["mineral says: wood at 7,1", "wood_2 says: stone at 1,1"]
    assert seen["mineral"].split("\n")[:2] == ["wood says: stone at 1,1", "wood_2 says: stone at 1,1"]


def test_the_first_text_says_all_that_is_needed():
    for agents in (1, 2, 3):
        texts, _ = ResourceGathering(wording="terse", agents=agents).reset(seed=0, options={"task": 0})
        for agent, text in texts.items():
            assert text.startswith(f"You are {agent}")
            assert text.isascii()
            assert len(text.split("Turn 1 of 4.")[0].split()) < 150
            assert "Need: wood 3 stone 3 iron 1" in text
            for word in ("9 x 9", "4 steps", "within 2 cells", '"path"'):
                assert word in text
            assert ("comm" in text) == (agents > 1)
    texts, _ = ResourceGathering(wording="terse").reset(seed=0, options={"task": 0})
    assert "You gather wood; mineral gathers stone and iron." in texts["wood"]
    assert "You gather stone and iron; wood gathers wood." in texts["mineral"]


def test_the_state_is_the_privileged_view():
    env = start()
    turn(env, path((1, 1), (2, 1), (3, 1), (4, 1)), {})
    turn(env, path((5, 1)), {})
    assert env.state() == (
        "turn 2 of 4 need wood 2 stone 3 iron 1\nwood 5,1 mineral 8,1\n"
        "stone 2 iron 1 at 1,1, wood 1 at 7,1, stone 1 at 0,2, wood 1 at 8,2\n.........\n.m.....w.\ns.......w"
    )


def test_an_episode_forgets_the_last_and_replays():
    env = start()
    first = env.reset(seed=0)
    runs = []
    for _ in range(2):
        env.reset(seed=0)
        runs.append([turn(env, {**fact("stone", 1, 1), **path((t + 1, 1))}, path((7, t % 3))) for t in range(4)])
    assert runs[0] == runs[1]
    assert env.reset(seed=0) == first


# --- hostile answers -----------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            '{"comm":',
            '{"path":[[1,1],[2,1]]}',
            '{"comm":{"kind":"stone","at":[1,1]}}',
            '"path":',
            '"kind":',
            '"at":',
            '"stone"',
        ),
        *("{", "}", "[", "]", ",", ":", '"', "\\", "\\ud800", "null", "NaN", "-Infinity", "1e999", "9" * 40, "-1", "0", "1"),
        *(" ", "\n", "\x00", "\u2028", "\ud800", "\U0001f600", "<|im_end|>", "```json\n", "```", "true"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 14) | st.floats(allow_nan=False) | st.text(max_size=20) | PIECES,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(["comm", "path", "kind", "at", "x"]), inner),
    max_leaves=12,
)
HOSTILE = st.one_of(
    st.text(max_size=100),
    st.lists(PIECES, max_size=30).map("".join),
    st.dictionaries(st.sampled_from(["comm", "path", "x"]), VALUES).map(json.dumps),
)


@settings(max_examples=200, deadline=2000, derandomize=True, database=None)
@given(first=HOSTILE, second=HOSTILE)
@example(first='{"comm":"' + "x" * (1 << 20), second="{" * (1 << 20))
@example(first='{"a":' * (1 << 18), second="\n" * (1 << 20) + "{}" + " " * (1 << 20))
@example(first='{"comm":{"kind":"' + "x" * 8000 + '","at":[1,1]}}', second='{"path":[' + "[1,1]," * 1300 + "[1,1]]}")
def test_no_text_breaks_the_world(first, second):
    env = start(turns=2)
    for _ in range(2):
        if not env.agents:
            break
        reward, info, observations = turn(env, first, second)
        assert math.isfinite(reward)
        assert -0.1 * 8 <= reward <= 15 + 0.1 * 2 + 0.15 * 2 + 0.05 * 8
        assert all(0 <= x < 9 and 0 <= y < 3 for x, y in env.place.values())
        assert info["metrics"]["rejected"] >= 0
        assert 0 <= info["metrics"]["progress"] <= 1
        assert all(len(text.split("\n")) <= 6 and len(text) < 300 for text in observations.values())
        assert isinstance(env.state(), str)


def test_a_megabyte_is_read_in_no_time():
    with cpu_seconds_at_most(2):
        for text in (
            "{" * (1 << 20),
            " " * (1 << 20),
            '{"path":[' + "[1,1]," * (1 << 18),
            "x" * (1 << 20) + "{}",
            "[" * (1 << 20),
        ):
            turn(start(), text, text)


def test_making_a_world_is_cheap():
    ResourceGathering(wording="terse", size=(6, 6)).reset(seed=0, options={"task": 0})
    with cpu_seconds_at_most(1):
        for _ in range(200):
            ResourceGathering(wording="terse", size=(6, 6)).reset(seed=0, options={"task": 0})
