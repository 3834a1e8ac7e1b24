"""`collm play`: a team whose agents live apart. No model is loaded here, no critic, and no torch."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.cli.evaluate import as_record, name_of, plain, show_table, told
from collm.envs.catalogue import make
from collm.errors import ConfigError
from collm.reports.screen import Screen
from collm.reports.tables import cost_table
from collm.runs.directory import run_config
from collm.settings.load import load_config
from collm.settings.rooms import Config

if TYPE_CHECKING:
    from collm.engines.http import Cost, Endpoint

CHANGEABLE = ("env.", "evaluation.", "rollout.", "run.seed", "team.thinking")
"""Settings, or prefixes of settings, that apply without training and without a loaded model."""


def run(arguments: argparse.Namespace) -> int:
    for name, least in (("episodes", 1), ("retries", 0), ("max_requests", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is too few; give {least} or more.")
    if not (math.isfinite(arguments.timeout) and arguments.timeout > 0):
        raise ConfigError(f"--timeout {arguments.timeout} is not a time to wait. Give seconds above 0.")
    config = settings(arguments.task, arguments.overrides)
    env: Any = make(config.env.name, split=arguments.split, **config.env.options)
    places = endpoints(arguments.agent, env.possible_agents, arguments.api_key_env or "")

    from collm.engines.http import HttpEngine
    from collm.rollout.collector import LocalCollector
    from collm.training.evaluate import evaluate

    engine = HttpEngine(
        places,
        read=arguments.timeout,
        retries=arguments.retries,
        max_requests=arguments.max_requests,
        thinking=config.team.thinking,
    )
    try:
        with Screen(stderr=True).status("playing"):
            result = evaluate(config, LocalCollector(engine), episodes=arguments.episodes, split=arguments.split)
    finally:
        engine.close()
    failed = [episode for episode in result.episodes if episode.failure]
    costs = cost_per_episode(engine.costs, result.seconds, len(result.episodes))
    if arguments.json:
        record: dict[str, Any] = as_record(result) if result.played else {"episodes": 0, "failed": len(failed)}
        record |= {
            "requests": engine.sent,
            "cost_per_episode": costs,
            "failures": {episode.label or str(episode.task): episode.failure for episode in failed},
        }
        if arguments.show:
            record["played"] = [plain(episode) for episode in result.episodes]
        print(json.dumps(record, allow_nan=False))
        return 1 if failed else 0
    console = Screen()
    if arguments.show:
        for episode in result.episodes:
            console.print(told(episode))
    if result.played:
        max_reward = getattr(env, "max_reward", None)
        title = f"{config.env.name}, {len(places)} agents on separate endpoints"
        show_table(title, result, config, max_reward, split=arguments.split)
    console.print(cost_table(costs))
    for episode in failed:
        console.print(f"failed: {name_of(episode)}: {episode.failure}")
    if not result.played:
        console.print("No episode was played to its end.")
    return 1 if failed else 0


def cost_per_episode(costs: Mapping[str, Cost], seconds: float, num_episodes: int) -> dict[str, dict[str, float | None]]:
    """Agent, and "team" for all -> means over episodes: requests, tokens read and sampled (None if unknown), seconds.

    An agent's seconds are those of its answers; the team's are `seconds`, the wall-clock time of all episodes, which are played
    at the same time.
    """
    found = {agent: asdict(cost) for agent, cost in costs.items()}
    columns = {name: [cost[name] for cost in found.values()] for name in ("requests", "prompt_tokens", "sampled_tokens")}
    found["team"] = {**{name: None if None in column else sum(column) for name, column in columns.items()}, "seconds": seconds}
    return {
        who: {name: None if total is None else round(total / num_episodes, 4) for name, total in cost.items()}
        for who, cost in found.items()
    }


def settings(task: str, overrides: Mapping[str, Any]) -> Config:
    """The settings to play with: those of a run, a recipe, or a task's own defaults, with `{"room.key": value}` on top."""
    for key in overrides:
        if not key.startswith(CHANGEABLE):
            raise ConfigError(
                f"{key!r} does not apply to `collm play`, which takes env.*, rollout.*, evaluation.*, run.seed "
                "and team.thinking."
            )
    is_run = (Path(task) / "config.json").is_file()
    if "env.name" in overrides and not is_run:
        raise ConfigError(
            f"`collm play` takes the task as an argument: collm play {overrides['env.name']} --agent NAME=URL ..."
        )
    if is_run:
        return run_config(Path(task), overrides)
    if task.endswith(".toml"):
        return load_config(Path(task), overrides)
    return load_config(None, {"env.name": task, **overrides})


def endpoints(given: Sequence[str], agents: Sequence[str], key_env: str) -> dict[str, Endpoint]:
    """Parse NAME=URL words into endpoints, one for each of the task's agents. Raises ConfigError."""
    from collm.engines.http import endpoint

    places: dict[str, Endpoint] = {}
    for word in given:
        name, equals, url = word.partition("=")
        if not equals:
            raise ConfigError(f"--agent {word!r} is not NAME=URL, such as {agents[0]}=http://127.0.0.1:8000/v1.")
        if name in places:
            raise ConfigError(f"--agent {name} is given twice.")
        if name not in agents:
            raise ConfigError(f"--agent {name}: the task's agents are {', '.join(agents)}.")
        places[name] = endpoint(name, url, key_env=key_env)
    missing = [agent for agent in agents if agent not in places]
    if missing:
        raise ConfigError(
            f"no endpoint is given for {', '.join(missing)}: add " + " ".join(f"--agent {name}=URL" for name in missing) + "."
        )
    return places
