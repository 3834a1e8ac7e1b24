"""What tests share: one torch thread, and the tiny model that the package ships, loaded once (no test may change it)."""

from __future__ import annotations

import os

import pytest
import torch
from order import dealt

from collm.engines.local import LocalEngine
from collm.envs.catalogue import EnvSpec
from collm.models.policy import Policy
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.types import Group, Sampling

torch.set_num_threads(1)

PASSED_BY = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (PASSED_BY, "127.0.0.1", "localhost")))
"""A machine's HTTP proxy does not reach the servers that tests start."""


@pytest.hookimpl(trylast=True)  # once marks have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = dealt(items, [item.name for item in items], workers)


@pytest.fixture(autouse=True)
def _one_thread():
    """Trainers set the number of threads for the whole process."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny() -> Policy:
    return Policy.from_pretrained("tiny")


@pytest.fixture(scope="session")
def sampled(tiny):
    """A function that plays str_build with the tiny model: three turns of a persistent world, two builders, two words."""
    kept: dict[tuple, list[Group]] = {}

    def play(sampling: Sampling, history: str = "full", *, max_turns: int | None = None) -> list[Group]:
        key = (sampling, history, max_turns)
        if key not in kept:
            env = EnvSpec(
                "str_build",
                {"wording": "terse", "world": "persistent", "turns": 3, "strings": ["IT", "C"], "feedback": "perfect"},
            )
            plan = Plan(env, history=history, sampling=sampling, max_turns=max_turns, group_size=2)
            engine = LocalEngine(Team({"builder_0": tiny, "builder_1": tiny}))
            kept[key] = collect(plan, engine, [0, 1], [11, 12])
        return kept[key]

    return play
