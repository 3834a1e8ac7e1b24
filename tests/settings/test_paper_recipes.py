"""The recipes of the paper load, and hold the numbers of its table."""

from __future__ import annotations

import itertools

import pytest
from places import ROOT

from collm.envs.catalogue import find
from collm.learning.parts import VALUE_WEIGHT
from collm.settings.load import load_config
from collm.settings.rooms import Config

FOLDER = ROOT / "recipes" / "paper"
METHODS = ("collm-cc-paper", "collm-dc", "magrpo", "ac", "grpo")
WRITING = {"model": "Qwen/Qwen3-1.7B", "max_tokens": 256, "temperature": 0.7, "top_p": 0.9, "turns": 1, "tasks": 1100}
BUILDING = {
    "model": "Qwen/Qwen3-4B-Instruct-2507", "max_tokens": 512, "temperature": 0.6, "top_p": 0.6, "turns": 4, "tasks": 8,
}  # fmt: skip
CODING = {
    "model": "Qwen/Qwen2.5-Coder-3B", "max_tokens": 256, "temperature": 0.6, "top_p": 0.6, "turns": 2, "tasks": 130,
}  # fmt: skip
TASKS = {"tldr": WRITING, "arxiv": WRITING, "coop_code": CODING, "str_build": BUILDING, "house_build": BUILDING}
CRITICS = {
    "tldr": (5e-6, 20, 4),
    "arxiv": (5e-6, 20, 4),
    "str_build": (2.5e-6, 150, 1),
    "house_build": (5e-6, 150, 1),
    "coop_code": (5e-6, 80, 4),
}
"""Learning rate of agents and critic, epochs, buffer (turn samples per agent)."""
GROUPS = {
    "tldr": (5e-6, 2, 4),
    "arxiv": (5e-6, 2, 4),
    "str_build": (5e-6, 20, 2),
    "house_build": (1e-5, 20, 2),
    "coop_code": (2e-5, 6, 4),
}
"""Learning rate, epochs, group size of MAGRPO."""
AC_EPOCHS = {"tldr": 4, "arxiv": 4}
GRPO_EPOCHS = {"tldr": 1, "arxiv": 1, "coop_code": 20}


def recipe(task: str, method: str) -> Config:
    return load_config(FOLDER / task / f"{method}.toml")


def test_there_is_one_file_per_task_and_method() -> None:
    assert {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.toml")} == {
        f"{task}/{method}.toml" for task in TASKS for method in METHODS
    }


@pytest.mark.parametrize(("task", "method"), list(itertools.product(TASKS, METHODS)))
def test_a_recipe_holds_the_papers_numbers(task: str, method: str) -> None:
    config, facts = recipe(task, method), TASKS[task]
    assert config.algorithm.name == method
    assert config.env.name == task
    assert config.env.options.get("turns", 1) == facts["turns"]
    assert config.team.model == facts["model"]
    assert {name: getattr(config.rollout, name) for name in ("max_tokens", "temperature", "top_p")} == {
        name: facts[name] for name in ("max_tokens", "temperature", "top_p")
    }
    assert (config.algorithm.gamma, config.learner.clip_norm) == (0.9, None)
    assert config.algorithm.lam == config.critic.lam == 0
    assert config.algorithm.max_drop is None
    assert (config.env.options.get("agents", 2) == 1) == (method in ("ac", "grpo"))
    critic = method in ("collm-cc-paper", "collm-dc", "ac")
    lr, epochs, size = (CRITICS if critic else GROUPS)[task]
    epochs = {"ac": AC_EPOCHS, "grpo": GRPO_EPOCHS}.get(method, {}).get(task, epochs)
    assert config.learner.lr == lr
    assert config.run.iterations * config.rollout.tasks == epochs * facts["tasks"]
    if critic:
        assert (config.critic.lr, VALUE_WEIGHT, config.algorithm.normalize) == (lr, 0.6, "agent")
        assert config.rollout.tasks == max(1, size // facts["turns"])
        assert not config.critic.state
        assert config.critic.metrics == "none"
    else:
        assert config.algorithm.group_size == size
        assert config.algorithm.tree == (facts["turns"] > 1)
    assert config.critic.body == "auto"


@pytest.mark.parametrize("task", TASKS)
def test_options_are_those_of_the_world(task: str) -> None:
    """The public data may be out of reach, so worlds that read it are asked for their options alone."""
    known = find(task).__init__.__annotations__
    for method in METHODS:
        assert set(recipe(task, method).env.options) <= set(known)
    if task == "str_build":
        assert recipe(task, "collm-cc-paper").env.options == {"turns": 4, "wording": "plain"}
        assert find(task)(turns=4).num_tasks == TASKS[task]["tasks"]
