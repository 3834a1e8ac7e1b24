"""Whether a solved team stays solved: `agree` at the rates of recipes/compare/agree.toml, over seeds.

    python benchmarks/stability.py --set algorithm.max_drop=0.03  # collm-cc and collm-dc, two and three agents, 20 seeds
    python benchmarks/stability.py --set algorithm.max_drop=0.03 critic.body=none   # without a language model as critic
    python benchmarks/stability.py --methods collm-cc --seeds 0-4 # every step whole
    python benchmarks/stability.py --remedy bounded --methods collm-cc --agents 2 --seeds 100-105 --iterations 20  # of REMEDIES
    python benchmarks/stability.py --table                        # the table of all runs in the file, without a run

Each run's training rewards are added to a JSON file; a run that is there already is not repeated. A run counts as solved at the
first iteration with a training reward of at least 0.99; its lowest reward is the lowest of the iterations after that. The end
is the mean of the last three iterations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from collm import seeds
from collm.algorithms.advantages import discounted_returns
from collm.learning import residual
from collm.learning.batch import Batch
from collm.learning.critics import Values
from collm.learning.parts import PolicyPart
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


class Bounded:
    """V is held within the range of returns seen in earlier iterations."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, values_ENT: torch.Tensor, returns_ET: torch.Tensor) -> torch.Tensor:
        held_ENT = values_ENT.clamp(self.low, self.high)
        self.low, self.high = min(self.low, returns_ET.min().item()), max(self.high, returns_ET.max().item())
        return held_ENT


def gated(values_ENT: torch.Tensor, returns_ET: torch.Tensor) -> torch.Tensor:
    """Where V explains none of the variance of the returns, the mean return of the turn takes its place (EVPO)."""
    held_ENT = values_ENT.clone()
    for t in range(returns_ET.shape[1]):
        missed = (returns_ET[:, t, None] - values_ENT[..., t]).var()
        if missed >= returns_ET[:, t].var():
            held_ENT[..., t] = returns_ET[:, t].mean()
    return held_ENT


def hold_values(learner: Any, held: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    """Credit is assigned with held(V, returns) in place of V, for agents and critics alike."""
    read = learner._read

    def read_and_held(batch: Batch) -> Values:
        text, regressions = read(batch), learner.regressions
        predicted_ENT = residual.predict_returns(regressions.returns, regressions.read(batch), batch, text.read_ENT)
        returns_ET = discounted_returns(batch.rewards_ET, gamma=learner.config.algorithm.gamma)
        return dataclasses.replace(text, values_ENT=held(text.values_ENT + predicted_ENT, returns_ET) - predicted_ENT)

    learner._read = read_and_held


def optimizers(learner: Any, *, critics: bool) -> list[dict[str, Any]]:
    """Groups of parameters of all critics, or of all policies."""
    parts = [part for part in learner.hands.parts if isinstance(part, PolicyPart) != critics]
    return [group for part in parts for group in part.optimizer.param_groups]


def quick_critic(learner: Any) -> None:
    for group in optimizers(learner, critics=True):
        group["betas"] = (0.0, group["betas"][1])


def slow_critic(learner: Any) -> None:
    for group in optimizers(learner, critics=True):
        group["full_lr"] /= 4


def large_epsilon(learner: Any) -> None:
    for group in optimizers(learner, critics=False):
        group["eps"] = 1e-4


REMEDIES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "bounded": ("V within the range of returns seen", lambda learner: hold_values(learner, Bounded())),
    "gate": ("mean return where V explains nothing", lambda learner: hold_values(learner, gated)),
    "quick_critic": ("critic without momentum", quick_critic),
    "slow_critic": ("critic at a quarter of its rate", slow_critic),
    "epsilon": ("epsilon of the policies' AdamW 1e-4", large_epsilon),
}
"""Name -> what it is, and what it changes in the learner."""


def settings_of(method: str, agents: int, changes: dict[str, str]) -> dict[str, Any]:
    rate = RATES[agents]
    critic = {"critic.body": "auto", "critic.lr": rate}
    values: dict[str, Any] = {"algorithm.name": method, "env.agents": agents, "learner.lr": rate, **critic}
    if method in ("magrpo", "grpo"):
        values |= {"rollout.tasks": 16}  # groups of 4
        del values["critic.lr"]
    return {**values, "run.threads": 1, "evaluation.every": 0, **changes}


def play(settings: dict[str, Any], seed: int, iterations: int, remedies: Sequence[str]) -> dict[str, Any]:
    """Training rewards, mean values of each critic, fractions of steps that were taken, and alarms of one run."""
    recipe = ROOT / "recipes" / "tiny" / "agree.toml"
    config = prepare(load_config(recipe, {**settings, "run.seed": seed, "run.iterations": iterations}))
    made, alarms = assemble(config), Alarms([{"iteration": 0}])
    for name in reversed(remedies):  # the first holds V last
        REMEDIES[name][1](made.learner)
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
    parser.add_argument(
        "--remedy", nargs="+", default=[], choices=REMEDIES, help="what is done instead of max_drop, or beside it"
    )
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
        if given.remedy:
            done = "all five" if set(given.remedy) == set(REMEDIES) else ", ".join(REMEDIES[one][0] for one in given.remedy)
            name = f"{name}, {done}"
        key = f"{name} seed {seed}"
        if key in runs:
            continue
        started = time.monotonic()
        runs[key] = play(settings_of(method, agents, changes), seed, given.iterations, given.remedy)
        end, low = judged(runs[key]["rewards"])
        print(f"{key}: end {end:.3f}, lowest {low}, {time.monotonic() - started:.0f} s", flush=True)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(
            given.out, "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(runs[key])}" for key in sorted(runs)) + "\n}\n"
        )
    print(table(runs))


if __name__ == "__main__":
    main()
