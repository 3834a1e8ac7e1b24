"""The observations of `str_build`, in two wordings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from collm.envs.building.font import SIZE
from collm.envs.wording import Texts

if TYPE_CHECKING:
    from collm.envs.building.str_build import StrBuild


def _plain_first(env: StrBuild, agent: str) -> str:
    number = len(env.possible_agents)
    lines = []
    if not env.blind_first_turn:
        lines += [f"The cells of {env.word}, as x y z:", _listed(env), ""]
    lines.append(f"The box has x from 0 to {env.width - 1}, y from 0 to {SIZE - 1} and z 0.")
    if env.world == "persistent":
        lines.append(f"Blocks stay. {_build_shows(env, agent)}. The block air empties a cell.")
    if number > 1:
        lines.append(f"You are {agent}, one of {number} builders, who fill these cells together. Each has blocks of its own.")
    one, two = env.palettes[agent]
    lines += [f"Your blocks are {one} and {two}. Use both; like blocks must not touch.", "", _imperative(env, agent)]
    return "\n".join(lines)


def _plain_later(env: StrBuild, agent: str, total: float) -> str:
    lines = [_reward(env, total)] if env.feedback == "score" else []
    if env.feedback == "position":
        lines += ["The cells to fill, as x y z:", _listed(env)]
    if env.feedback == "perfect":
        listed = ", ".join(f"{x} {y} 0 by {owner}" for (x, y), owner in env.wrong(agent))
        lines += [f"Wrong cells and who mends them: {listed}" if listed else "All cells are right."]
    lines += [_build(env), env.drawn(env.shown(agent))] if env.world == "persistent" else ["The box is empty again."]
    return "\n".join([*lines, "", _imperative(env, agent)])


def _reward(env: StrBuild, total: float) -> str:
    return f"Reward of your own blocks: {total:.2f}" if env.view == "own" else f"Reward: {total:.2f}"


def _build(env: StrBuild) -> str:
    return "Your own blocks:" if env.view == "own" else "Build:"


def _build_shows(env: StrBuild, agent: str) -> str:
    which = "you see your own blocks alone," if env.view == "own" else "it shows"
    return f"The build is empty; {which} {env.legend(agent)}"


def _listed(env: StrBuild) -> str:
    return ", ".join(f"{x} {y} 0" for x, y in sorted(env.target))


def _imperative(env: StrBuild, agent: str) -> str:
    number = len(env.possible_agents)
    share = "all" if number == 1 else "half" if number == 2 else f"one of {number} parts"
    return (
        f"Write one line for each cell that you fill, at most {env.limit} lines, for {share} of the cells. "
        f"Each line must begin with: /setblock, for example: /setblock 3 4 0 {env.palettes[agent][0]}"
    )


def _terse_first(env: StrBuild, agent: str) -> str:
    one, two = env.palettes[agent]
    number = len(env.agents)
    who = f"You are {agent}, one of {number} builders with different blocks" if number > 1 else f"You are {agent}"
    what = "Build" if env.blind_first_turn else f"Build {env.word}"
    lines = [
        f"{who}. {what} together." if number > 1 else f"{who}. {what}.",
        f"Box: x 0..{env.width - 1} right, y 0..{SIZE - 1} up, z 0.",
    ]
    if not env.blind_first_turn:
        lines += ["Target:", env.rows(lambda cell: "#" if cell in env.target else ".")]
    if env.world == "persistent":
        lines.append(f"Blocks stay. {_build_shows(env, agent)}.")
    lines += [
        f"Your blocks: {one} {two} air. Use both; like blocks must not touch.",
        f"At most {env.limit} lines: /setblock x y z block",
    ]
    return "\n".join(lines)


def _terse_later(env: StrBuild, agent: str, total: float) -> str:
    agents = env.possible_agents
    lines = [_reward(env, total)] if env.feedback == "score" else []
    if env.feedback == "position":
        listed = " ".join(f"{x},{y}" for x, y in sorted(env.target))
        share = "about half" if len(agents) == 2 else f"about 1/{len(agents)}" if len(agents) > 2 else "all"
        lines += [f"Target cells: {listed}", f"Take {share} of them."]
    if env.feedback == "perfect":
        listed = " ".join(f"{x},{y}:{owner}" for (x, y), owner in env.wrong(agent))
        lines += [f"Wrong cells and who mends them: {listed}" if listed else "All cells are right."]
    if env.world == "persistent":
        lines += [_build(env), env.drawn(env.shown(agent)), f"At most {env.limit} lines."]
    else:
        lines.append("The box is empty again.")
    return "\n".join(lines)


PLAIN = Texts(_plain_first, _plain_later)
TERSE = Texts(_terse_first, _terse_later)
