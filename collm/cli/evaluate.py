"""`collm evaluate`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collm.envs.catalogue import make
from collm.errors import ConfigError, EnvError, RunError
from collm.models.blueprint import Blueprint, saved_policies
from collm.reports.screen import Screen
from collm.reports.tables import evaluation_table, held_out
from collm.runs.directory import check_named, checkpoints, command, read_settings, usable_cores
from collm.runs.files import is_leftover
from collm.settings.load import apply_overrides, load_config, parse_config
from collm.settings.rooms import Config
from collm.studies.intervals import Interval, by_task, explain, interval
from collm.studies.series import REWARD

if TYPE_CHECKING:
    from collm.models.team import Team
    from collm.training.evaluate import Evaluation

CHANGEABLE = ("env.", "evaluation.", "rollout.", "run.threads", "run.device", "run.seed", "team.compute", "team.api_key_env")
"""Settings (or their beginnings) of a trained run that its evaluation may change."""


def run(arguments: argparse.Namespace) -> int:
    source, which = arguments.source, arguments.checkpoint
    if arguments.episodes is not None and arguments.episodes < 1:
        raise ConfigError(
            f"--episodes {arguments.episodes} plays nothing. Give 1 or more, or leave it out to play each held-out task once."
        )
    if source.is_dir():
        config = run_config(source, arguments.overrides)
        weights, what = find_weights(source, which)
    elif source.exists() or source.suffix == ".toml":
        config = load_config(source, arguments.overrides)
        if which not in ("final", "start"):
            raise ConfigError(f"--checkpoint {which} is for run directories: a recipe's team is untrained. Leave it out.")
        weights, what = None, "untrained team"
    else:
        raise RunError(f"there is neither a run directory nor a recipe {str(source)!r}.")
    max_reward = getattr(make(config.env.name, split="eval", **config.env.options), "max_reward", None)

    import torch

    from collm.engines.catalogue import make_engine
    from collm.rollout.collector import LocalCollector
    from collm.training.assemble import with_remote
    from collm.training.evaluate import evaluate

    torch.set_num_threads(config.run.threads or usable_cores())
    with Screen(stderr=True).status("playing the held-out tasks"):
        engine = with_remote(make_engine(load_team(config, weights), config.rollout), config)
        result = evaluate(config, LocalCollector(engine), episodes=arguments.episodes)
        engine.close()
    failed = [episode for episode in result.episodes if episode.failure]
    if not result.played:
        raise EnvError(f"none of {len(failed)} held-out episodes was played to its end; the first: {failed[0].failure}")
    if arguments.json:
        print(json.dumps(as_record(result), allow_nan=False))
        return 0
    show_table(f"{source.resolve().name}, {what}", result, config, max_reward)
    return 0


def measured(result: Evaluation) -> tuple[dict[str, Interval], list[str], int]:
    """Mean and interval of the reward and each metric, what a reader must know about them, and how many tasks were played."""
    tasks = [episode.label or str(episode.task) for episode in result.played]
    intervals = {name: interval(list(by_task(tasks, column).values())) for name, column in result.columns().items()}
    notes = explain(intervals)
    num_tasks = len(set(tasks))
    if num_tasks < len(tasks):
        notes.append(f"{len(tasks)} episodes of {num_tasks} distinct tasks; each task counts once")
    return intervals, notes, num_tasks


def as_record(result: Evaluation) -> dict[str, Any]:
    """An evaluation as plain values."""
    intervals, notes, _ = measured(result)
    record: dict[str, Any] = {
        "episodes": len(result.played),
        "reward": intervals[REWARD].plain(),
        "metrics": {name: found.plain() for name, found in intervals.items() if name != REWARD},
        "tokens": result.tokens,
        "seconds": round(result.seconds, 3),
    }
    if notes:
        record["note"] = "; ".join(notes)
    if num_failed := len(result.episodes) - len(result.played):
        record["failed"] = num_failed
    return record


def show_table(who: str, result: Evaluation, config: Config, max_reward: float | None, *, split: str = "eval") -> None:
    """An evaluation as a table on the terminal."""
    intervals, notes, num_tasks = measured(result)
    temperature = config.evaluation.temperature
    sampling = f"at temperature {temperature:g}" if temperature else "greedy"
    tasks = held_out(num_tasks) if split == "eval" else f"{num_tasks} tasks of {split}"
    per_episode = result.tokens / len(result.episodes)
    notes.append(f"{result.tokens:,} tokens sampled ({per_episode:,.0f} an episode) in {result.seconds:.1f} s")
    failed = [episode for episode in result.episodes if episode.failure]
    if failed:
        notes.append(f"failed and counted in no mean: {len(failed)} episodes; the first: {failed[0].failure}")
    Screen().print(evaluation_table(f"{who}: {tasks}, {sampling}", intervals, notes, max_reward))


def run_config(folder: Path, overrides: Mapping[str, Any], *, playing: bool = True) -> Config:
    """A run's settings with `{"room.key": value}` on top. Raises RunError or ConfigError.

    playing: the run's environment and servers are to be used, so those that it brings itself must be named in `overrides`.
    """
    values = read_settings(folder)
    if playing:
        check_named(folder, values, overrides)
    for key in overrides:
        if not key.startswith(CHANGEABLE):
            raise ConfigError(
                f"{key!r} is no setting that the evaluation of a trained run can change: these are env.*, evaluation.*, "
                "rollout.*, run.threads, run.device, run.seed, team.compute and team.api_key_env."
            )
    apply_overrides(values, overrides)
    return parse_config(values)


def find_weights(run: Path, which: str) -> tuple[Path | None, str]:
    """The folder of a run's weights, None for the untrained team, and what to call them.

    `which`: "final", "best" (by held-out reward), "start", or a number of iterations. Raises RunError or ConfigError.
    """
    if which == "start":
        return None, "untrained team"
    if which == "final":
        if not (run / "final").is_dir():
            raise RunError(
                f"run {str(run)!r} has no final weights yet: finish it with `{command('collm', 'train', '--resume', run)}`, "
                "or use --checkpoint best."
            )
        return run / "final", "final weights"
    saved = checkpoints(run)
    kept = ", ".join(str(int(path.name)) for path in saved) or "none"
    if which == "best":
        number = best_iteration(run, saved)
    elif which.isascii() and which.isdigit():
        number = int(which)
    else:
        raise ConfigError(f"--checkpoint {which!r} is not final, best, start, or a number of iterations (saved: {kept}).")
    if number == 0:
        return None, "untrained team"
    folder = run / "checkpoints" / f"{number:06d}"
    if folder not in saved:
        raise RunError(
            f"run {str(run)!r} has no checkpoint after {number} iterations; saved: {kept}. Name one of these, or final."
        )
    return folder, f"weights after {number} iterations" + (" (best)" if which == "best" else "")


def best_iteration(run: Path, saved: list[Path]) -> int:
    """When the held-out reward was best, by the newest checkpoint's account. Raises RunError where it does not say."""
    if not saved:
        raise RunError(
            f"run {str(run)!r} has no checkpoint yet: let it go on with `{command('collm', 'train', '--resume', run)}`."
        )
    path = saved[-1] / "state.json"
    try:
        best = json.loads(path.read_bytes())["best"]
        number = None if best is None else int(best[1])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error!r}. Name another: --checkpoint N or final.") from error
    if number is None:
        raise RunError(f"run {str(run)!r} has made no held-out evaluation, so no checkpoint is best. Use --checkpoint final.")
    return number


def load_team(config: Config, weights: Path | None, *, only: str | None = None) -> Team:
    """The team of a config, untrained or with weights of a run's `final` or checkpoint folder. Raises RunError.

    only: load this one agent, for a process of its own; neither environment nor data are needed then.
    """
    from safetensors import SafetensorError

    from collm.models.sources import is_adapter
    from collm.runs.checkpoint import load_policies
    from collm.training.assemble import make_team, resolve_device
    from collm.training.task import check_fit, trained_agents

    run = config.run.model_copy(update={"device": resolve_device(config.run.device)})
    config = config.model_copy(update={"run": run})
    if only is None:
        agents = trained_agents(config, check_fit(config))
    else:
        agents, everyone = (only,), (only,) if weights is None else saved_agents(weights, shared=config.team.shared)
        if only in config.team.remote or (everyone and only not in everyone):
            elsewhere = f" (on a server: {', '.join(config.team.remote)})" if config.team.remote else ""
            raise ConfigError(f"there is no agent {only!r} in this run; its agents are {', '.join(everyone)}{elsewhere}.")
    if weights is None:
        return make_team(config, agents)
    try:
        if weights.name == "final":
            adapters = {agent for agent in agents if is_adapter(weights / agent)}
            for agent in agents:
                for name in (*([] if agent in adapters else ["config.json"]), "tokenizer_config.json"):
                    if not (weights / agent / name).is_file():
                        raise ValueError(f"it lacks {agent}/{name}")
            models = {**config.team.models, **{agent: str(weights / agent) for agent in agents if agent not in adapters}}
            team = make_team(config.model_copy(update={"team": config.team.model_copy(update={"models": models})}), agents)
            for agent, policy in team.members().items():
                if policy.adapter is not None:  # on the run's own base, wherever that lies now
                    policy.adapter.load(weights / agent)
            return team
        team = make_team(config, agents)
        load_policies(weights, {_saved_as(config, name, weights): policy for name, policy in team.members().items()})
        return team
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"{str(weights)!r} cannot be read: {error}. Choose other weights with --checkpoint.") from error


def saved_agents(weights: Path, *, shared: bool = False) -> tuple[str, ...]:
    """Agents whose weights a run's `final` or checkpoint folder holds. Of agents that share weights a checkpoint names only the
    first: then the names are those in `final`, and none (they are not known) before there is one."""
    final = weights if weights.name == "final" else weights.parents[1] / "final"
    if weights.name == "final" or shared:
        places = sorted(final.iterdir()) if final.is_dir() else []
        return tuple(place.name for place in places if place.is_dir() and not is_leftover(place.name))
    return _policies(weights)


def _policies(checkpoint: Path) -> tuple[str, ...]:
    return saved_policies(path.stem for path in sorted(checkpoint.glob("*.safetensors")))


def _saved_as(config: Config, agent: str, weights: Path) -> str:
    """Under whose name a checkpoint holds an agent's weights: its own, or that of the first who shares them."""
    saved = _policies(weights)
    return agent if agent in saved else Blueprint.of(config, (*saved, agent)).policy_of(agent).name
