"""Every task has a recipe that trains the tiny team, and none of them loosens a gate of the reward."""

from __future__ import annotations

import pytest
from places import ROOT

from collm.envs.catalogue import ENVIRONMENTS, find
from collm.settings.load import load_config

FOLDER = ROOT / "recipes" / "tiny"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.toml"))
SHAPE = {"wording", "agents", "turns", "size", "strings", "eval_strings", "lengths", "world", "reward", "feedback", "colours"}
"""Options that choose a size, a horizon or a world's variant; gates and limits of a reward are none of them."""


def test_every_task_has_a_recipe() -> None:
    assert set(ENVIRONMENTS) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_the_tiny_team_on_its_task(name: str) -> None:
    config = load_config(FOLDER / f"{name}.toml")
    assert name.startswith(config.env.name)
    assert config.team.model == "tiny"
    assert config.run.threads == 1
    assert set(config.env.options) <= SHAPE
    env = find(config.env.name)(**config.env.options)
    assert env.num_tasks >= 1
