"""Poor programmers, for pre-training.

They write Python that nearly always parses and solves parts of the problem, without regard to the team-mate's part: a helper
does some step; main solves the whole problem, only returns the helper's result, or uses it, at times correctly.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from collm.envs.coding.coop_code import CoopCode
from collm.envs.coding.problems import ENDS, STEPS, Recipe, draw, part_of, problem_of
from collm.tiny.workshop.scripted import Chat


def coop_code(rng: random.Random) -> list[Chat]:
    """One or two agents' chats about a problem kept for pre-training; a second turn, where there is one, after real tests."""
    recipe = draw(rng)
    while part_of(recipe) != "pretraining":
        recipe = draw(rng)
    env = CoopCode(wording="terse", agents=rng.choices((1, 2, 3), weights=(1, 12, 1))[0])
    env.problems, env.num_tasks = (problem_of(recipe, rng),), 1
    env.stop_above = None
    observations, _ = env.reset(seed=rng.getrandbits(32), options={"task": 0})
    chats: dict[str, Chat] = {agent: [] for agent in env.agents}
    for turn in range(rng.choices((1, 2), weights=(3, 1))[0]):
        if turn:
            observations, *_ = env.step({agent: chat[-1][1] for agent, chat in chats.items()})
        for agent, chat in chats.items():
            chat.append((observations[agent], write(env, recipe, agent, rng)))
    played = list(chats.values())
    rng.shuffle(played)
    return played[:2]


def write(env: CoopCode, recipe: Recipe, agent: str, rng: random.Random) -> str:
    """An answer: a function of the agent's, with slips; fenced once in a while."""
    text = _helper(recipe, agent, rng) if agent in env.helpers else _main(env, recipe, rng)
    slip = rng.random()
    if slip < 0.03:
        text = text[: rng.randint(1, len(text))]
    elif slip < 0.05:
        text = text.replace(":", "", 1)
    return f"```python\n{text}\n```" if rng.random() < 0.05 else text


def _expression(recipe: Recipe, rng: random.Random) -> str:
    """A step of the problem, or now and then another."""
    if rng.random() < 0.75:
        return recipe.source(rng.randrange(len(recipe.steps)))
    return STEPS[rng.choice(sorted(STEPS))][1].format(k=rng.randint(2, 5))


def _end(recipe: Recipe, rng: random.Random) -> str:
    return ENDS[recipe.end if rng.random() < 0.7 else rng.choice(sorted(ENDS))][1]


def _helper(recipe: Recipe, agent: str, rng: random.Random) -> str:
    name = agent if rng.random() < 0.93 else rng.choice(("helper", recipe.entry_point))
    forms: dict[Callable[[], list[str]], float] = {
        lambda: [f"    return {_expression(recipe, rng)}"]: 6,
        lambda: [f"    xs = {_expression(recipe, rng)}", f"    return {_end(recipe, rng)}"]: 2,
        lambda: [f"    return {_end(recipe, rng)}"]: 1,
        lambda: ["    pass"]: 0.5,
    }
    return "\n".join([f"def {name}(xs):", *rng.choices(list(forms), list(forms.values()))[0]()])


def _main(env: CoopCode, recipe: Recipe, rng: random.Random) -> str:
    aux = rng.choice(env.helpers) if env.helpers else "sorted"
    forms: dict[Callable[[], list[str]], float] = {
        lambda: [*_steps(recipe, rng), f"    return {_end(recipe, rng)}"]: 6,
        lambda: [f"    return {aux}(xs)"]: 2.5,
        lambda: [f"    xs = {aux}(xs)", f"    return {_end(recipe, rng)}"]: 2,
        lambda: [f"    xs = {aux}(xs)", *_steps(recipe, rng)[:1], f"    return {_end(recipe, rng)}"]: 2,
        lambda: [*_steps(recipe, rng)[:1], f"    xs = {aux}(xs)", f"    return {_end(recipe, rng)}"]: 1.5,
        lambda: [f"    {aux}(xs)", *_steps(recipe, rng), f"    return {_end(recipe, rng)}"]: 0.7,
    }
    name = recipe.entry_point if rng.random() < 0.97 else "main"
    return "\n".join([f"def {name}(xs):", *rng.choices(list(forms), list(forms.values()))[0]()])


def _steps(recipe: Recipe, rng: random.Random) -> list[str]:
    """The problem's steps in order, one left out or exchanged now and then."""
    lines = [f"    xs = {recipe.source(step)}" for step in range(len(recipe.steps)) if rng.random() < 0.8]
    return [line if rng.random() < 0.9 else f"    xs = {_expression(recipe, rng)}" for line in lines]
