"""Accuracy of `collm blame` on planted failures: does credit, no-op replay or resampling name the answer that was exchanged?

In a recorded episode the answer of one agent at one turn, both drawn uniformly, is replaced by that agent's answer of the same
turn to another task. All other answers stay as recorded, so that a lower return is this answer's doing alone; episodes whose
return does not fall are left out. The players repeat what the environments' scripted players answered in the same task and
turn, exchanged in the same way with probability `--noise`; in quote, they repeat a passage which begins at random. These are
policies over answers, from which resampling draws.
Credit is collm-cc's without a language model as critic: its regressions learn from `--learn` batches.

    python benchmarks/blame.py --episodes 50 --folder runs/blame

Every batch is one line in FOLDER/ENV.jsonl; a second call continues. The numbers go to docs/results/blame.json, and the table
of docs/results/blame.md is printed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from collm import seeds
from collm.engines.scripted import ScriptedEngine
from collm.learning.learner import PartsLearner
from collm.learning.parts import LocalHands
from collm.rollout.live import begin, live_episode, resume
from collm.rollout.plan import Plan
from collm.rollout.replay import Branch, replay_with, replay_without
from collm.rollout.truth import truths
from collm.runs.files import write_text
from collm.settings.load import load_config
from collm.settings.rooms import Config
from collm.studies.blame import Costs, no_op_costs
from collm.studies.intervals import interval
from collm.training.assemble import Assembly, assemble, prepare
from collm.training.task import draw_tasks
from collm.types import Completion, Episode, Group, Request

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {
    "str_build": ("str_build_sparse", {}),
    "resource_gathering": ("resource_gathering", {}),
    "coop_code": ("coop_code", {}),
    "quote": ("quote", {}),
}
"""Name -> recipe in recipes/tiny, and further settings."""
METHODS = ("credit", "no-op", "resampling")
BATCH = 32
"""Episodes of one batch, in which credit is assigned together."""
LEARN_NOISE = 0.3
"""`--noise` of the batches that regressions learn from, so that returns vary."""
Row = dict[str, Any]


class Passages(ScriptedEngine):
    """Writers of quote who repeat twelve words from a place drawn at random."""

    trains = True

    def __init__(self) -> None:
        super().__init__(self.passage)

    @staticmethod
    def passage(request: Request) -> str:
        told = request.messages[0].text.split("\n\n")[0].split()
        start = random.Random(request.seed).randrange(max(1, len(told) - 11))
        return " ".join(told[start : start + 12])


class Plans(ScriptedEngine):
    """Players who know what scripted players answered in each task, turn by turn, and sometimes take another task's answer."""

    trains = True

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__(self.planned)
        self.noise = noise
        self.known: dict[tuple[str, str], list[str]] = {}
        """(agent, its first observation) -> its answers."""

    def learn(self, episodes: Sequence[Episode]) -> None:
        for episode in episodes:
            for agent in episode.agents:
                turns = [turn for turn in episode.turns if agent in turn.completions]
                self.known[agent, turns[0].observations[agent]] = [turn.completions[agent].text for turn in turns]

    def planned(self, request: Request) -> str:
        first, t = request.messages[0].text, sum(message.role == "assistant" for message in request.messages)
        rng = random.Random(request.seed)
        own = self.known[request.agent, first]
        if rng.random() < self.noise:
            known = self.known.items()
            others = [plan[t] for (agent, told), plan in known if agent == request.agent and told != first and t < len(plan)]
            if others:
                return rng.choice(others)
        return own[min(t, len(own) - 1)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", choices=ENVIRONMENTS, action="append", help="default: all four")
    parser.add_argument("--episodes", type=int, default=50, help="planted failures of each environment, at least")
    parser.add_argument("--learn", type=int, default=16, help="batches that the regressions learn from")
    parser.add_argument("--plays", type=int, default=4, help="K of resampling; 0 leaves it out")
    parser.add_argument("--noise", type=float, default=0.05, help="probability that a scripted answer is another task's")
    parser.add_argument("--folder", type=Path, default=Path("runs/blame"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in given.env or ENVIRONMENTS:
        play(name, given.folder / f"{name}.jsonl", given.episodes, given.learn, given.plays, given.noise)
    found = {name: rows for name in ENVIRONMENTS if (rows := read(given.folder / f"{name}.jsonl"))}
    given.out.mkdir(parents=True, exist_ok=True)
    summary = {name: summarize(rows) for name, rows in found.items()}
    write_text(given.out / "blame.json", json.dumps(summary, indent=1) + "\n")
    print(table(summary))
    return 0


def read(path: Path) -> list[Row]:
    """The planted failures of all finished batches."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [row for line in lines for row in json.loads(line)["rows"]]


def play(name: str, path: Path, wanted: int, learn: int, plays: int, noise: float) -> None:
    """Play batches until `wanted` failures are planted; appends a line per batch."""
    if len(read(path)) >= wanted:
        return
    recipe, settings = ENVIRONMENTS[name]
    overrides = {"critic.body": "none", "algorithm.name": "collm-cc", "rollout.tasks": BATCH, "evaluation.every": 0}
    config = prepare(load_config(ROOT / f"recipes/tiny/{recipe}.toml", {**overrides, "run.threads": 1, **settings}))
    engine = Passages() if name == "quote" else Plans()
    made = assemble(config, engine=engine)
    learner = PartsLearner(LocalHands([]), made.team.agents, made.learner.critic_labels, made.learner.regressions, config)
    for number in range(learn):
        learner.update(batch_of(made, config, number, LEARN_NOISE), number)
    made.engine.rest()
    done = len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0
    while len(read(path)) < wanted:
        began = time.monotonic()
        groups = batch_of(made, config, learn + done, noise)
        rows = judge(made, learner, planted(made, groups, done), plays)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"seconds": time.monotonic() - began, "rows": rows}) + "\n")
        made.engine.rest()
        done += 1
        print(f"{name}: {len(read(path))} of {wanted}, {time.monotonic() - began:.0f} s a batch", file=sys.stderr, flush=True)


def batch_of(made: Assembly, config: Config, number: int, noise: float) -> list[Group]:
    """A batch played by the engine; no-op replays included."""
    keys = [seeds.derive(config.run.seed, "blame", number, i) for i in range(BATCH)]
    tasks = draw_tasks(config.run.seed, number, BATCH, made.tasks)
    if isinstance(made.engine, Plans):
        made.engine.noise = noise
        made.engine.learn([scripted(made.plan, task, key) for task, key in zip(tasks, keys, strict=True)])
    return made.collector.play(made.plan, tasks, keys, 0)


def scripted(plan: Plan, task: int, seed: int) -> Episode:
    """An episode of the environment's scripted player."""
    env: Any = plan.env.make(plan.split)
    live = live_episode(plan, task, seed, env=env)
    begin(live)
    while live.requests:
        answers = env.scripted_answers()
        resume(live, [Completion(request.agent, answers[request.agent]) for request in live.requests])
    return live.episode


def other_answers(episodes: Sequence[Episode], task: int, t: int, agent: str) -> list[Completion]:
    """The answers of an agent at a turn in episodes of other tasks."""
    turns = [episode.turns[t] for episode in episodes if episode.task != task and t < len(episode.turns)]
    return [turn.completions[agent] for turn in turns if agent in turn.completions]


def total(episode: Episode) -> float:
    return sum(turn.reward for turn in episode.turns)


def planted(made: Assembly, groups: Sequence[Group], number: int) -> list[tuple[Episode, int, str]]:
    """(episode with one exchanged answer, its turn, its agent), where the return falls."""
    rng = seeds.stream("planted failures", number)
    episodes = [episode for group in groups for episode in group.episodes if not episode.failure]
    branches = []
    for episode in episodes:
        t = rng.randrange(len(episode.turns))
        agent = rng.choice(sorted(episode.turns[t].completions))
        answers = other_answers(episodes, episode.task, t, agent)
        if answers:
            branches.append((episode, t, agent, rng.choice(answers)))
    replayed = replay_with(made.plan, [Branch(episode, t, {agent: answer}) for episode, t, agent, answer in branches])
    return [
        (replace(after, own_from=0), t, agent)
        for (episode, t, agent, _), after in zip(branches, replayed, strict=True)
        if after is not None and not after.failure and total(after) < total(episode) - 1e-9
    ]


def judge(made: Assembly, learner: PartsLearner, found: Sequence[tuple[Episode, int, str]], plays: int) -> list[Row]:
    """For each planted failure: where it is, and for each method the fraction of the answers blamed most that are it."""
    episodes = [episode for episode, _, _ in found]
    if not episodes:
        return []
    replay_without(made.plan, episodes)
    said = learner.credit([Group(episode.task, [episode]) for episode in episodes])
    places = [[(t, agent) for t, turn in enumerate(e.turns) for agent in turn.completions] for e in episodes]
    wanted = [(episode, t, agent) for episode, own in zip(episodes, places, strict=True) for t, agent in own]
    known = iter(truths(made.plan, made.engine, wanted, plays, gamma=1.0) if plays else ())
    rows = []
    for e, (episode, turn, agent) in enumerate(found):
        costs: dict[str, Costs] = {
            "credit": {place: -(note.advantage or 0.0) for place, note in said[e].items()},
            "no-op": no_op_costs(made.plan, episode) or {},
        }
        if plays:
            costs["resampling"] = {p: -truth.mean for p in places[e] if not (truth := next(known)).unknown}
        rows.append(
            {
                "turn": turn,
                "agent": agent,
                "turns": len(episode.turns),
                "answers": len(places[e]),
                "agents": len(episode.agents),
            }
            | {method: hits(own, turn, agent) for method, own in costs.items()}
        )
    return rows


def hits(costs: Costs, turn: int, agent: str) -> dict[str, float]:
    """Fractions of the answers with the greatest cost that have the right agent, the right turn, and both."""
    if not costs:
        return {"agent": 0.0, "step": 0.0, "both": 0.0}
    top = max(costs.values())
    blamed = [place for place, cost in costs.items() if cost >= top - 1e-9]
    right = {"agent": lambda p: p[1] == agent, "step": lambda p: p[0] == turn, "both": lambda p: p == (turn, agent)}
    return {what: sum(map(test, blamed)) / len(blamed) for what, test in right.items()}


def summarize(rows: Sequence[Row]) -> Row:
    """Accuracies over planted failures, with bootstrap intervals, and those of the baselines."""

    def rate(values: Sequence[float]) -> Row:
        return interval([float(value) for value in values], unit="episode").plain()

    often = {what: Counter(row[what] for row in rows).most_common(1)[0][0] for what in ("agent", "turn")}
    found: Row = {"episodes": len(rows), "turns": max(row["turns"] for row in rows)}
    for method in METHODS:
        judged = [row[method] for row in rows if method in row]
        found[method] = {what: rate([row[what] for row in judged]) for what in ("agent", "step", "both") if judged}
    found["random"] = {
        "agent": rate([1 / row["agents"] for row in rows]),
        "step": rate([1 / row["turns"] for row in rows]),
        "both": rate([1 / row["answers"] for row in rows]),
    }
    found["most frequent"] = {
        "agent": rate([row["agent"] == often["agent"] for row in rows]),
        "step": rate([row["turn"] == often["turn"] for row in rows]),
    }
    found["last turn"] = {"step": rate([row["turn"] == row["turns"] - 1 for row in rows])}
    found["first turn"] = {"step": rate([row["turn"] == 0 for row in rows])}
    return found


def table(summary: Row) -> str:
    """The accuracies as a Markdown table; a step is named only where an episode has several turns."""
    lines = ["| environment | planted | by | agent | step | agent and step |", "|---|---|---|---|---|---|"]
    for name, found in summary.items():
        for method in (*METHODS, "random", "most frequent", "last turn", "first turn"):
            rates = found[method]
            cells = [shown(rates[what]) if what in rates else "" for what in ("agent", "step", "both")]
            if found["turns"] == 1:
                cells[1:] = ["", ""]
            if any(cells):
                lines.append(f"| {name} | {found['episodes']} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown(rate: Row) -> str:
    low = "" if rate["low"] is None else f" [{rate['low']:.2f}, {rate['high']:.2f}]"
    return f"{rate['mean']:.2f}{low}"


if __name__ == "__main__":
    sys.exit(main())
