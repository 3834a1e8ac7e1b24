"""Critics that read text, at their cost: trained, trained with a replay, on a frozen body, and none.

    python benchmarks/critics.py --list                             # every cell, and whether it is done
    python benchmarks/critics.py --only "tiny/str_build-joint/*/0"  # cells by pattern
    python benchmarks/critics.py --play                             # after `make smollm2`: the episodes of smollm2/*
    python benchmarks/critics.py --table                            # the tables of all cells in the file, without a run

A cell is MODEL/CASE/KIND/SEED. Each is a process; one that is in the file already is not repeated. The kinds:
    none        no language model
    trained     one step an iteration, over all its episodes
    replay      8 recent iterations are kept; every step of an iteration reads 8 of their sequences
    hl_gauss    the same, with a histogram of returns in place of the squared error
    frozen      ridge regression on hidden states of a body that is not trained; the last 32 iterations
Beside the text a regression reads the rewards so far and readings (`critic.metrics = "readings"`); in the kinds "X-alone" the
text is all, and "none-alone" reads the rewards.

`tiny` trains online, without the difference baseline. The cases: persistent, sparse str_build in which builders see their own
blocks alone, with a critic of the joint history or own critics; sparse quote with own views; coop_code over two turns.
`smollm2` learns offline: episodes of sparse quote with own views that the untrained team of recipes/real/quote_sparse.toml
played are read in iterations of 32 (4 tasks, 8 times each), and only the critic learns. A seed is the order of tasks.

    explained   variance of returns within tasks (task means removed) before the last turn, predicted before it is learned
                from; over the second half of the iterations; mean over own critics
    area        mean training reward
    seconds     CPU seconds of an update (of the critic alone offline); of the iterations after the first
    memory      highest resident memory of the cell's process, imports included, in MiB
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matched import Row, Stopwatch, in_a_process, peak_memory_mb

from collm.runs.files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "critics" / "critics.json"
EPISODES = ROOT / "build" / "critics-episodes.json"
RECIPES = ROOT / "recipes"

OWN_BUILD = {"env.view": "own", "algorithm.group_size": 2, "rollout.tasks": 8}
QUOTE = {"env.turns": 4, "env.max_words": 6, "env.reward": "sparse", "env.view": "own"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny/str_build-joint": ("tiny/str_build_sparse.toml", {**OWN_BUILD, "critic.reads": "joint"}),
    "tiny/str_build-own": ("tiny/str_build_sparse.toml", {**OWN_BUILD, "critic.reads": "own"}),
    "tiny/quote": ("tiny/quote.toml", {**QUOTE, "rollout.max_tokens": 16, "rollout.tasks": 16, "algorithm.group_size": 2}),
    "tiny/coop_code": ("tiny/coop_code.toml", {"env.turns": 2, "rollout.tasks": 16, "algorithm.group_size": 2}),
    "smollm2/quote": ("real/quote_sparse.toml", {"env.view": "own", "rollout.tasks": 4, "algorithm.group_size": 8}),
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "none": {"critic.body": "none"},
    "trained": {"critic.body": "auto"},
    "replay": {"critic.body": "auto", "critic.replay": 8},
    "hl_gauss": {"critic.body": "auto", "critic.replay": 8, "critic.loss": "hl_gauss"},
    "frozen": {"critic.body": "frozen"},
}


def cells(seeds: Sequence[int]) -> list[str]:
    kinds = [f"{kind}{alone}" for alone in ("", "-alone") for kind in KINDS]
    return [f"{case}/{kind}/{seed}" for case in CASES for kind in kinds for seed in seeds]


def settings_of(name: str, given: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The recipe of a cell, and the settings that differ from it."""
    case, kind, seed = name.rsplit("/", 2)
    recipe, changes = CASES[case]
    text = KINDS[kind.removesuffix("-alone")]
    steps = {"critic.epochs": given.steps} if "critic.replay" in text else {}
    values = {"critic.metrics": "none" if kind.endswith("-alone") else "readings", "algorithm.teammates": "none"}
    values |= {"run.seed": int(seed), "run.iterations": given.iterations, "run.threads": 1, "evaluation.every": 0}
    return RECIPES / recipe, {**changes, **values, **text, **steps}


def measure(name: str, given: argparse.Namespace) -> Row:
    """One cell, in this process."""
    import torch

    from collm.runs.heap import HEAP
    from collm.settings.load import load_config
    from collm.training.assemble import prepare

    torch.set_num_threads(1)
    HEAP.restrict()  # as `collm train` does: without it a third of the seconds is memory that is returned and taken again
    config = prepare(load_config(*settings_of(name, given)))
    found: Row = {"steps": config.critic.epochs, "iterations": [], "seconds": [], "rewards": []}
    source = offline(config, given) if name.startswith("smollm2/") else online(config)
    for number, (groups, learner, labels) in enumerate(source):
        watch = Stopwatch()
        with watch:
            metrics = learner.update(groups, number).metrics
        HEAP.iterated()
        found["iterations"].append(explained_of(metrics, labels))
        found["seconds"].append(round(watch.cpu, 3))
        returns = [sum(turn.raw_reward for turn in episode.turns) for group in groups for episode in group.episodes]
        found["rewards"].append(round(mean(returns), 4))
    return {**found, "memory": round(peak_memory_mb())}


def explained_of(metrics: Mapping[str, float], labels: Sequence[str]) -> list[list[float | None]]:
    """[sum of squared deviations within tasks, explained variance (mean over critics)] of each turn; None where unknown."""
    found: list[list[float | None]] = []
    while f"spread_turn_{len(found)}" in metrics:
        t = len(found)
        values = [metrics[f"{label}/explained_within_tasks_turn_{t}"] for label in labels]
        explained = sum(values) / len(values)
        found.append([round(metrics[f"spread_turn_{t}"], 5), None if explained != explained else round(explained, 4)])
    return found


def online(config: Any) -> Iterator[tuple[Any, Any, list[str]]]:
    """(groups, learner, labels of its critics) of each iteration of a run."""
    from collm import seeds
    from collm.training.assemble import assemble
    from collm.training.task import draw_tasks

    made, seed = assemble(config), config.run.seed
    learner: Any = made.learner
    for iteration in range(config.run.iterations):
        tasks = draw_tasks(seed, iteration, config.rollout.tasks, made.tasks)
        keys = [seeds.derive(seed, "episode", iteration, i) for i in range(len(tasks))]
        yield made.collector.play(made.plan, tasks, keys, iteration), learner, list(learner.critic_labels)
        made.engine.load(made.team)


def offline(config: Any, given: argparse.Namespace) -> Iterator[tuple[Any, Any, list[str]]]:
    """The same over kept episodes; the learner has no policies."""
    from collm import seeds
    from collm.learning.learner import PartsLearner
    from collm.learning.parts import LocalHands, PolicyPart
    from collm.training.assemble import make_learner, make_team
    from collm.types import Sampling

    groups = kept_episodes(config, given)
    whole = make_learner(
        make_team(config, groups[0].episodes[0].agents), config, Sampling(max_tokens=config.rollout.max_tokens)
    )
    parts = [part for part in whole.hands.parts if not isinstance(part, PolicyPart)]  # type: ignore[attr-defined]
    learner = PartsLearner(LocalHands(parts), whole.agents, whole.critic_labels, whole.regressions, config)
    seeds.stream(config.run.seed, "order of groups").shuffle(groups)
    size = config.rollout.tasks
    for start in range(0, min(len(groups), size * config.run.iterations), size):
        yield groups[start : start + size], learner, list(learner.critic_labels)


def kept_episodes(config: Any, given: argparse.Namespace) -> list[Any]:
    """Groups of episodes from the file, played and added first if it has too few."""
    import numpy as np

    from collm.types import Completion, Episode, Group, Turn

    wanted = config.rollout.tasks * given.iterations
    kept = json.loads(EPISODES.read_text(encoding="utf-8")) if EPISODES.exists() else []
    if len(kept) < wanted:
        raise SystemExit(f"{EPISODES} has {len(kept)} of {wanted} groups; run with --play first.")

    def answers(texts: Mapping[str, str]) -> dict[str, Completion]:
        return {agent: Completion(agent, text, (), np.zeros(0)) for agent, text in texts.items()}

    def episode(task: int, row: Row) -> Episode:
        turns = [Turn(seen, answers(said), reward, reward) for seen, said, reward in row["turns"]]
        agents, last = tuple(row["agents"]), row["observations"]
        return Episode(task, 0, agents, turns=turns, terminated=True, observations=last, label=str(task))

    return [Group(group["task"], [episode(group["task"], row) for row in group["episodes"]]) for group in kept[:wanted]]


def play(given: argparse.Namespace) -> None:
    """Play the offline episodes that are missing, an iteration at a time, and add them to the file."""
    from collm import seeds
    from collm.runs.files import write_text
    from collm.settings.load import load_config
    from collm.training.assemble import assemble, prepare
    from collm.training.task import draw_tasks

    config = prepare(load_config(*settings_of("smollm2/quote/none/0", given)))
    kept = json.loads(EPISODES.read_text(encoding="utf-8")) if EPISODES.exists() else []
    made = assemble(config)
    for iteration in range(len(kept) // config.rollout.tasks, given.iterations):
        tasks = draw_tasks(0, iteration, config.rollout.tasks, made.tasks)
        keys = [seeds.derive(0, "episode", iteration, i) for i in range(len(tasks))]
        for group in made.collector.play(made.plan, tasks, keys, iteration):
            kept.append({"task": group.task, "episodes": [recorded(e) for e in group.episodes if not e.failure]})
        EPISODES.parent.mkdir(parents=True, exist_ok=True)
        write_text(EPISODES, json.dumps(kept))
        print(f"{len(kept)} groups in {EPISODES}", flush=True)


def recorded(episode: Any) -> Row:
    turns = [
        (turn.observations, {agent: answer.text for agent, answer in turn.completions.items()}, turn.reward)
        for turn in episode.turns
    ]
    return {"agents": episode.agents, "turns": turns, "observations": episode.observations}


def pooled(iterations: Sequence[Any], turn: int) -> float:
    """Explained variance of several iterations together: 1 - sum of squares missed / sum of squares."""
    rows = [row[turn] for row in iterations if row[turn][1] is not None]
    return sum(spread * explained for spread, explained in rows) / max(sum(spread for spread, _ in rows), 1e-12)


def table(results: Mapping[str, Row]) -> str:
    """A table for each case: one row per kind, means over seeds; offline explained variance by episodes seen."""
    lines: list[str] = []
    for case in CASES:
        rows: dict[str, list[Row]] = {}
        for name, row in results.items():
            if name.rsplit("/", 2)[0] == case:
                rows.setdefault(name.rsplit("/", 2)[1], []).append(row)
        if not rows:
            continue
        quarters = [f"explained, quarter {q}" for q in (1, 2, 3, 4)]
        lines += [f"\n{case}", "", f"| kind | seeds | explained | {' | '.join(quarters)} | area | seconds | memory |"]
        lines.append("|---" * 10 + "|")
        for kind, found in rows.items():
            num = len(found[0]["iterations"])
            parts = [slice(num // 2, None), *(slice(num * q // 4, num * (q + 1) // 4) for q in range(4))]
            last = len(found[0]["iterations"][0]) - 1
            shown = [f"{mean([pooled(row['iterations'][part], last) for row in found]):.2f}" for part in parts]
            seconds = mean([mean(row["seconds"][1:] or row["seconds"]) for row in found])
            area, memory = mean([mean(row["rewards"]) for row in found]), mean([row["memory"] for row in found])
            lines.append(f"| {kind} | {len(found)} | {' | '.join(shown)} | {area:.3f} | {seconds:.2f} | {memory:.0f} |")
    return "\n".join(lines)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(len(numbers), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cells to run, such as tiny/*/frozen/0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--steps", type=int, default=50, help="steps an iteration of the kinds with a replay")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--play", action="store_true", help="play the episodes of the offline cells that are missing, and stop")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.cell:
        print(json.dumps(measure(given.cell, given)))
        return
    if given.play:
        play(given)
        return
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    chosen = [name for name in cells(given.seeds) if any(fnmatch.fnmatch(name, pattern) for pattern in given.only)]
    if given.list:
        print("\n".join(f"{'done' if name in results else '    '} {name}" for name in chosen))
        return
    for name in [] if given.table else chosen:
        if name in results:
            continue
        sizes = ["--iterations", str(given.iterations), "--steps", str(given.steps)]
        results[name] = in_a_process([sys.executable, __file__, "--cell", name, *sizes], 1)
        given.out.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(results[key])}" for key in sorted(results))
        write_text(given.out, f"{{\n{rows}\n}}\n")
        print(name, f"{sum(results[name]['seconds']):.0f} CPU seconds in updates", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
