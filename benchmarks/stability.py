"""Whether a solved team stays solved: `agree` at the rates of recipes/compare/agree.toml, over seeds.

    python benchmarks/stability.py --set algorithm.max_drop=0.03  # collm-cc and collm-dc, two and three agents, 20 seeds
    python benchmarks/stability.py --set algorithm.max_drop=0.03 critic.body=none   # without a language model as critic
    python benchmarks/stability.py --methods collm-cc --seeds 0-4 # every step whole
    python benchmarks/stability.py --table                        # the table of all runs in the file, without a run

Each run's training rewards are added to a JSON file; a run that is there already is not repeated. A run counts as solved at the
first iteration with a training reward of at least 0.99; its lowest reward is the lowest of the iterations after that. The end
is the mean of the last three iterations.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from collm import seeds
from collm.runs.alarms import PREFIX, Alarms
from collm.runs.files import write_text
from collm.runs.log import describe
from collm.settings.load import load_config
from collm.training.assemble import assemble, prepare
from collm.training.task import draw_tasks

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "stability" / "stability.json"
RATES = {1: 3e-4, 2: 1e-3, 3: 5e-4}
"""Number of agents -> learning rate of agents and critics."""
SOLVED, KEPT, END = 0.99, 0.85, 0.95


def settings_of(method: str, agents: int, changes: dict[str, str]) -> dict[str, Any]:
    rate = RATES[agents]
    critic = {"critic.body": "auto", "critic.lr": rate}
    values: dict[str, Any] = {"algorithm.name": method, "env.agents": agents, "learner.lr": rate, **critic}
    if method in ("magrpo", "grpo"):
        values |= {"rollout.tasks": 16}  # groups of 4
        del values["critic.lr"]
    return {**values, "run.threads": 1, "evaluation.every": 0, **changes}


def play(settings: dict[str, Any], seed: int, iterations: int) -> dict[str, Any]:
    """Training rewards, mean values of each critic, fractions of steps that were taken, and alarms of one run."""
    recipe = ROOT / "recipes" / "tiny" / "agree.toml"
    config = prepare(load_config(recipe, {**settings, "run.seed": seed, "run.iterations": iterations}))
    made, alarms = assemble(config), Alarms([{"iteration": 0}])
    found: dict[str, Any] = {"rewards": [], "values": [], "fractions": [], "alarms": {}}
    for iteration in range(iterations):
        tasks = draw_tasks(seed, iteration, config.rollout.tasks, made.tasks)
        keys = [seeds.derive(seed, "episode", iteration, i) for i in range(len(tasks))]
        groups = made.collector.play(made.plan, tasks, keys, iteration)
        metrics = made.learner.update(groups, iteration).metrics
        made.engine.load(made.team)
        record = {"iteration": iteration + 1, **describe([e for group in groups for e in group.episodes]), **metrics}
        found["rewards"].append(round(record["reward/raw"], 4))
        found["values"].append([round(x, 3) for name, x in metrics.items() if name.endswith("critic/value")])
        found["fractions"].append([x for name, x in metrics.items() if name.endswith("/step_fraction")])
        found["alarms"] |= {PREFIX + name: [iteration + 1, round(x, 3)] for name, x in alarms.raised(record).items()}
    return found


def judged(rewards: Sequence[float]) -> tuple[float, float | None]:
    """The end, and the lowest reward after the first solved iteration; None if there is none."""
    first = next((i for i, reward in enumerate(rewards) if reward >= SOLVED), len(rewards))
    return sum(rewards[-3:]) / 3, min(rewards[first + 1 :], default=None)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One row per case, over its seeds."""
    cases: dict[str, list[dict[str, Any]]] = {}
    for key, run in runs.items():
        cases.setdefault(key.rpartition(" seed ")[0], []).append(run)
    lines = [
        f"| case | seeds | end below {END} | solved, then below {KEPT} | lowest | never solved | area | steps shortened |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case, found in cases.items():
        results = [judged(run["rewards"]) for run in found]
        lows = [low for _, low in results if low is not None]
        areas = [sum(run["rewards"]) / len(run["rewards"]) for run in found]
        fractions = [x for run in found for row in run["fractions"] for x in row]
        lines.append(
            f"| {case} | {len(found)} | {sum(end < END for end, _ in results)} | {sum(low < KEPT for low in lows)} "
            f"| {min(lows, default=float('nan')):.2f} | {len(found) - len(lows)} | {sum(areas) / len(areas):.3f} "
            f"| {sum(x < 1 for x in fractions) / max(1, len(fractions)):.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["collm-cc", "collm-dc"])
    parser.add_argument("--agents", nargs="+", type=int, default=[2, 3], choices=RATES)
    parser.add_argument("--seeds", default="0-19", help="first and last seed")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings that differ")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of the file and stop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    changes = dict(pair.split("=", 1) for pair in given.set)
    first, last = map(int, given.seeds.split("-"))
    cases = [(seed, n, method) for seed in range(first, last + 1) for n in given.agents for method in given.methods]
    for seed, agents, method in [] if given.table else cases:
        name = " ".join([method, f"{agents} agents", *given.set])
        key = f"{name} seed {seed}"
        if key in runs:
            continue
        started = time.monotonic()
        runs[key] = play(settings_of(method, agents, changes), seed, given.iterations)
        end, low = judged(runs[key]["rewards"])
        print(f"{key}: end {end:.3f}, lowest {low}, {time.monotonic() - started:.0f} s", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(given.out, json.dumps(runs, indent=0, sort_keys=True).replace(",\n", ", ").replace("}, ", "},\n") + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
