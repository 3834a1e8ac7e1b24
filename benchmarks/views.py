"""How much of the return's variance the joint view determines, each agent's own view, and the environment's metrics.

    python benchmarks/views.py                              # scripted players, both environments; about two minutes
    python benchmarks/views.py str_build --player tiny      # the untrained tiny team, about ten minutes
    python benchmarks/views.py --view all                   # where every agent sees the work of all
    python benchmarks/views.py --seed 10 --episodes 36 --write docs/results/views.json

Persistent, sparse `str_build` and sparse `quote`, both with view = "own": agents see their own work alone, and the reward
comes after the last turn. A ridge regression reads, before a turn, one of
    joint    readings of all agents' texts together (`learning.readings`)
    AGENT    readings of this agent's texts alone
    metrics  the environment's metrics
and predicts the return. The explained variance is within tasks (task means removed) and held out: slopes are fitted to other
tasks (five folds). Intervals are 95 %, bootstrap over tasks. "online" is the same of `TurnRegression` with its forgetting,
as in a run: an iteration's returns are predicted before they are learned from; the first ten iterations are left out.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from collm import make, seeds
from collm.algorithms.regression import TurnRegression
from collm.engines.local import LocalEngine
from collm.envs.base import TextEnv
from collm.envs.catalogue import EnvSpec
from collm.learning.readings import PENALTY, Columns, joined, read
from collm.models.team import Team
from collm.rollout.collect import collect
from collm.rollout.plan import Plan
from collm.types import Sampling

Floats, Numbers = NDArray[np.float64], NDArray[np.int64]
WORDS = (
    "CC CE CI CT EC EE EH EI ET EU HE HH HL HO IH II IL IO IT IU LE LL LO LT LU OC OI OL OU TE TH TO TT TU UC UH UI UL UO UT"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "str_build": {
        "world": "persistent", "reward": "sparse", "turns": 8, "feedback": "score", "view": "own", "wording": "terse",
        "strings": WORDS.split(),
    },
    "quote": {"reward": "sparse", "turns": 4, "max_words": 6, "view": "own"},
}  # fmt: skip
TOKENS = {"str_build": 12, "quote": 24}
FOLDS, ITERATION, RESAMPLES = 5, 16, 2000


@dataclass
class Played:
    """One episode, reduced to what regressions read before each turn."""

    task: int
    score: float
    """The return: the reward after the last turn."""
    views: list[dict[str, Mapping[str, float]]]
    """Turn -> name of a view -> its numbers."""


def builds(env: Any, agent: str, rng: random.Random) -> str:
    """Each line fills, in 7 of 10 cases, a cell of the target that the builder does not see filled, else any cell."""
    lines = []
    for _ in range(env.limit):
        free = sorted(env.target - set(env.shown(agent)))
        x, y = rng.choice(free) if free and rng.random() < 0.7 else (rng.randrange(env.width), rng.randrange(5))
        lines.append(f"/setblock {x} {y} 0 {rng.choice(env.palettes[agent])}")
    return "\n".join(lines)


def quotes(env: Any, agent: str, rng: random.Random) -> str:
    """Consecutive words, one to `max_words`, from a place where the writer has covered nothing yet, if there is one."""
    told = env.text.split()
    starts = [n for n, word in enumerate(env.words) if word in env.content - env.written[agent]] or [0]
    start = min(rng.choice(starts), len(told) - 1)
    return " ".join(told[start : start + rng.randint(1, env.max_words)])


SCRIPTED: dict[str, Callable[[Any, str, random.Random], str]] = {"str_build": builds, "quote": quotes}


def scripted(name: str, tasks: Sequence[int], seed: int) -> list[Played]:
    """One episode of each task by scripted players."""
    found = []
    for number, task in enumerate(tasks):
        rng = seeds.stream(seed, "views", name, str(number))
        env = make(name, **OPTIONS[name])
        assert isinstance(env, TextEnv)
        firsts, _ = env.reset(seed=0, options={"task": task})
        newest, metrics, score = firsts, {}, 0.0
        views = []
        while env.agents:
            views.append(views_of(firsts, newest, metrics))
            newest, rewards, _, _, infos = env.step({agent: SCRIPTED[name](env, agent, rng) for agent in env.agents})
            metrics, score = next(iter(infos.values()))["metrics"], next(iter(rewards.values()))
        found.append(Played(task, score, views))
    return found


def tiny(name: str, tasks: Sequence[int], seed: int) -> list[Played]:
    """One episode of each task by the shipped tiny team, not trained any further."""
    spec = EnvSpec(name, OPTIONS[name])
    plan = Plan(spec, sampling=Sampling(max_tokens=TOKENS[name]))
    team = Team.from_pretrained(dict.fromkeys(spec.make().possible_agents, "tiny"))
    groups = collect(plan, LocalEngine(team), tasks, [seeds.derive(seed, "views", str(n)) for n in range(len(tasks))])
    found = []
    for episode in (group.episodes[0] for group in groups):
        firsts = episode.turns[0].observations
        views = [views_of(firsts, turn.observations, turn.metrics) for turn in episode.turns]
        found.append(Played(episode.task, episode.turns[-1].reward, views))
    return found


def views_of(
    firsts: Mapping[str, str], newest: Mapping[str, str], metrics: Mapping[str, float]
) -> dict[str, Mapping[str, float]]:
    """The numbers of each view."""
    own = {agent: read(firsts[agent], newest[agent]) for agent in firsts}
    return {"joint": read(joined(firsts.values()), joined(newest.values())), **own, "metrics": dict(metrics)}


def centred(numbers_SM: Floats, tasks_S: Numbers) -> Floats:
    """Numbers minus their task's mean."""
    _, index, counts = np.unique(tasks_S, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), *numbers_SM.shape[1:]))
    np.add.at(sums, index, numbers_SM)
    return numbers_SM - (sums / counts.reshape(-1, *[1] * (numbers_SM.ndim - 1)))[index]


def regression(view: str, width: int, turns: int, keep: float) -> TurnRegression:
    """As in a run: the penalty of the metric regression, or that of readings."""
    penalty = {} if view == "metrics" else {"strength": 0.0, "per_feature": PENALTY}
    return TurnRegression(width, turns, keep=keep, **penalty)


def held_out(view: str, features_ETM: Floats, returns_E: Floats, tasks_E: Numbers) -> Floats:
    """(E, T) predicted returns, task means removed, by slopes fitted to the other folds' tasks."""
    E, T, M = features_ETM.shape
    x_ETM = torch.from_numpy(centred(features_ETM, tasks_E))
    y_ET = torch.from_numpy(centred(returns_E, tasks_E))[:, None].expand(E, T)
    fold_E = torch.from_numpy(tasks_E % FOLDS)
    predicted_ET = torch.zeros(E, T, dtype=torch.float64)
    for fold in range(FOLDS):
        fitted = regression(view, M, T, keep=1.0)
        fitted.learn(x_ETM, y_ET, (fold_E != fold)[:, None].expand(E, T))
        predicted_ET[fold_E == fold] = fitted(x_ETM[fold_E == fold])
    return predicted_ET.numpy()


def online(view: str, features_ETM: Floats, returns_E: Floats) -> Floats:
    """(E, T) predicted returns of iterations of `ITERATION` episodes, each before it is learned from."""
    E, T, M = features_ETM.shape
    fitted = regression(view, M, T, keep=0.9)
    x_ETM, y_ET = torch.from_numpy(features_ETM), torch.from_numpy(returns_E)[:, None].expand(E, T)
    predicted = []
    for x_StM, y_St in zip(x_ETM.split(ITERATION), y_ET.split(ITERATION), strict=True):
        predicted.append(fitted(x_StM))
        fitted.learn(x_StM, y_St, torch.ones(y_St.shape, dtype=torch.bool))
    return torch.cat(predicted).numpy()


def explained(predicted_S: Floats, returns_S: Floats, tasks_S: Numbers) -> list[float]:
    """Explained variance within tasks, and the ends of its bootstrap interval over tasks."""
    y = centred(returns_S, tasks_S)
    missed = (y - centred(predicted_S, tasks_S)) ** 2
    tasks = np.unique(tasks_S)
    pairs = np.array([[missed[tasks_S == task].sum(), (y[tasks_S == task] ** 2).sum()] for task in tasks])
    drawn = np.random.default_rng(0).integers(len(tasks), size=(RESAMPLES, len(tasks)))
    sums = pairs[drawn].sum(1)
    ends = np.quantile(1 - sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return [float(1 - pairs[:, 0].sum() / pairs[:, 1].sum()), *map(float, ends)]


def measure(played: Sequence[Played]) -> dict[str, Any]:
    """View -> its number of columns, and explained variance (held out; online) before each turn."""
    tasks, returns = np.array([p.task for p in played]), np.array([p.score for p in played])
    T, found = len(played[0].views), {}
    for view in played[0].views[0]:
        columns = Columns(32)
        flat = [numbers[view] for p in played for numbers in p.views]
        columns.add(flat)
        x = columns(flat).double().numpy().reshape(len(played), T, -1)
        skip = 10 * ITERATION
        fitted, going = held_out(view, x, returns, tasks), online(view, x, returns)
        found[view] = {
            "columns": int((x[:, -1].std(0) > 0).sum()),
            "held_out": [explained(fitted[:, t], returns, tasks) for t in range(T)],
            "online": [explained(going[skip:, t], returns[skip:], tasks[skip:]) for t in range(T)],
        }
    return found


def shown(triple: Sequence[float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*triple)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=list(OPTIONS), help=f"of {', '.join(OPTIONS)}")
    parser.add_argument("--episodes", type=int, default=12, help="episodes of each task")
    parser.add_argument("--player", choices=("scripted", "tiny"), default="scripted")
    parser.add_argument("--view", choices=("own", "all"), default="own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a JSON file, to which the results are added")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.environments:
        OPTIONS[name]["view"] = args.view
        num_tasks = make(name, **OPTIONS[name]).num_tasks
        tasks = [task for _ in range(args.episodes) for task in range(num_tasks)]
        seeds.stream(args.seed, "views", name).shuffle(tasks)
        played = (scripted if args.player == "scripted" else tiny)(name, tasks, args.seed)
        mean, found = float(np.mean([p.score for p in played])), measure(played)
        case = f"{name}, view {args.view}, {args.player} players, seed {args.seed}"
        print(f"\n{case}: {len(played)} episodes of {num_tasks} tasks, mean return {mean:.3f}")
        print("| reads | columns that vary | held out | online | held out, before each turn |\n|---|---|---|---|---|")
        for view, row in found.items():
            turns = " ".join(f"{triple[0]:.2f}" for triple in row["held_out"])
            print(
                f"| {view} | {row['columns']} | {shown(row['held_out'][-1])} | {shown(row['online'][-1])} | {turns} |",
                flush=True,
            )
        if args.write:
            known = json.loads(args.write.read_text()) if args.write.exists() else {}
            known[case] = {"episodes": len(played), "tasks": num_tasks, "return": mean, "views": found}
            args.write.write_text(json.dumps(rounded(known), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same with four decimals."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
