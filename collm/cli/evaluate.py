"""`collm evaluate`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from collm.envs.catalogue import make
from collm.errors import ConfigError, EnvError, RunError
from collm.machine import usable_cores
from collm.reports.screen import Screen
from collm.reports.tables import evaluation_table, held_out
from collm.runs.directory import run_config
from collm.runs.weights import find_weights, load_team
from collm.settings.load import load_config
from collm.settings.rooms import Config
from collm.studies.intervals import Interval, by_task, explain, interval
from collm.studies.series import REWARD

if TYPE_CHECKING:
    from collm.training.evaluate import Evaluation
    from collm.types import Completion, Episode


def run(arguments: argparse.Namespace) -> int:
    source, which = arguments.source, arguments.checkpoint
    if arguments.episodes is not None and arguments.episodes < 1:
        raise ConfigError(
            f"--episodes {arguments.episodes} plays nothing. Give 1 or more, or leave it out to play each held-out task once."
        )
    if arguments.show is not None and arguments.show < 1:
        raise ConfigError(f"--show {arguments.show} shows nothing. Give 1 or more, or leave it out.")
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
        result = evaluate(config, LocalCollector(engine, shards=config.rollout.shards), episodes=arguments.episodes)
        engine.close()
    failed = [episode for episode in result.episodes if episode.failure]
    if not result.played:
        raise EnvError(f"none of {len(failed)} held-out episodes was played to its end; the first: {failed[0].failure}")
    if arguments.json:
        shown = {"played": [plain(episode) for episode in result.episodes[: arguments.show]]} if arguments.show else {}
        print(json.dumps({**as_record(result), **shown}, allow_nan=False))
        return 0
    for episode in result.episodes[: arguments.show or 0]:
        print(told(episode))
    show_table(f"{source.resolve().name}, {what}", result, config, max_reward)
    return 0


def measured(result: Evaluation) -> tuple[dict[str, Interval], list[str], int]:
    """(mean and interval of the reward and each metric, notes on these numbers, number of distinct tasks played)."""
    tasks = [episode.label or str(episode.task) for episode in result.played]
    intervals = {name: interval(list(by_task(tasks, column).values())) for name, column in result.columns().items()}
    notes = explain(intervals)
    num_tasks = len(set(tasks))
    if num_tasks < len(tasks):
        notes.append(f"{len(tasks)} episodes of {num_tasks} distinct tasks; each task counts once")
    return intervals, notes, num_tasks


def as_record(result: Evaluation) -> dict[str, Any]:
    """An evaluation as plain values, for JSON."""
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


def name_of(episode: Episode) -> str:
    return f"task {episode.task}" if episode.label in ("", str(episode.task)) else episode.label


def plain(episode: Episode) -> dict[str, Any]:
    """An episode as plain values, for JSON."""
    turns = [
        {
            "reward": turn.raw_reward,
            "parts": dict(turn.parts),
            "agents": {
                agent: {
                    "read": turn.observations[agent],
                    "text": answer.text,
                    "token_ids": None if answer.token_ids is None else answer.token_ids.tolist(),
                    "prompt_ids": None if answer.prompt_ids is None else answer.prompt_ids.tolist(),
                }
                for agent, answer in turn.completions.items()
            },
        }
        for turn in episode.turns
    ]
    return {"task": episode.task, "label": episode.label, "failure": episode.failure, "turns": turns}


def told(episode: Episode) -> str:
    """An episode as text for the terminal; lines that agents read begin with `|`, lines that they wrote with `>`."""
    from collm.types import printable

    lines = [f"--- {name_of(episode)}"]
    for number, turn in enumerate(episode.turns, start=1):
        where = f"turn {number}, " if len(episode.turns) > 1 else ""
        for agent, answer in turn.completions.items():
            count = sum(message.role == "user" for message in episode.examples.get(agent, ()))
            after = f", after {count} worked examples" if count else ""
            lines += [f"{where}{agent} read{after}:", *(f"  | {line}" for line in turn.observations[agent].splitlines())]
            if agent in turn.messages:
                lines += [f"{where}{agent} wrote to the others:", *_written(turn.messages[agent])]
            lines += [f"{where}{agent} wrote:", *_written(answer)]
        parts = ", ".join(f"{name} {value:.3g}" for name, value in turn.parts.items())
        lines.append(f"{where}reward {turn.raw_reward:.3g}{f' ({parts})' if parts else ''}")
    metrics = ", ".join(f"{name} {value:.3g}" for name, value in episode.metrics.items())
    lines += [f"metrics: {metrics}"] if metrics else []
    if episode.failure:
        lines.append(f"failed: {episode.failure}")
    return printable("\n".join(lines)) + "\n"


def _written(answer: Completion) -> list[str]:
    lines = [f"  > {line}" for line in answer.text.splitlines()] or ["  (nothing)"]
    return [*lines, "  (cut off at rollout.max_tokens)"] if answer.finish_reason == "length" else lines
