"""A pre-trained model on one device: gap between the engine's and the learner's log-probs, and learning within minutes.

    python benchmarks/real.py MODEL --data POSTS.jsonl                    # on a GPU; at most --minutes (6) in all
    python benchmarks/real.py tiny --data POSTS.jsonl --device cpu --iterations 1 --limit 4    # the same code on any machine

MODEL is a Hugging Face folder or hub name of a small chat model. Two writers each see the first 20 words of a post and repeat
part of it, in 14 tokens each, without seeing each other's answers; the reward is the fraction of the post's words, without stop
words, that at least one of them wrote. Each result is written to --out as JSON at once, the most important first:

    gap-*.json      |log-prob of the engine - log-prob of the learner| of fresh samples, before and after an update, for whole
                    models and adapters, in float32 and bfloat16
    learn-*.json    held-out reward before and after training with its 95 % interval, the curve, and seconds by phase
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from collm.envs.base import Outcome, TextEnv
from collm.envs.data import field, read_rows
from collm.envs.writing.lexicon import STOP_WORDS, words

HELD_OUT = 40
LORA = {"rank": 16, "alpha": 32.0}
FORMS: dict[str, dict[str, Any]] = {
    "whole": {"learner": {"lr": 2e-5}, "critic": {"lr": 2e-5}},
    "adapters": {"learner": {"lr": 5e-4}, "critic": {"lr": 1e-4}, "lora": LORA},
}


class Cover(TextEnv):
    """Two writers repeat parts of a post. Reward: fraction of its words, without stop words, that a writer wrote; optimum 1."""

    def __init__(self, data: str, length: int = 20, split: str = "train"):
        super().__init__(["first", "second"], turns=1)
        texts = [" ".join(field(row, ("post",), data).split()[:length]) for row in read_rows(data)]
        self.posts = texts[:HELD_OUT] if split == "eval" else texts[HELD_OUT:]
        self.num_tasks = len(self.posts)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.post = self.posts[task]
        return {agent: f"{self.post}\n\nYou are the {agent} writer. Repeat part of this text." for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        there = set(words(self.post)) - STOP_WORDS
        first, second = (set(words(answer)) & there for answer in answers.values())
        num = max(1, len(there))
        metrics = {"first": len(first) / num, "second": len(second) / num, "both": len(first & second) / num}
        covered = len(first | second) / num
        return Outcome(covered, {"covered": covered}, dict.fromkeys(answers, ""), metrics=metrics)


def settings(options: argparse.Namespace, form: str, algorithm: str, precision: str, folder: str) -> dict[str, Any]:
    """A run's settings; 64 joint actions per iteration with every algorithm."""
    groups = algorithm == "magrpo"
    rooms = {room: dict(values) for room, values in FORMS[form].items()}
    lora = rooms.pop("lora", None)
    return {
        "run": {
            "name": "run",
            "folder": folder,
            "iterations": options.iterations,
            "device": options.device,
            "tensorboard": False,
        },
        "env": {"name": "real:Cover", "data": str(options.data)},
        "team": {"model": options.model, "compute": precision, **({"lora": lora} if lora else {})},
        "rollout": {"tasks": options.joint_actions // (8 if groups else 1), "max_tokens": 14, "temperature": 0.7},
        "algorithm": {"name": algorithm, **({"group_size": 8} if groups else {})},
        "evaluation": {"every": options.iterations, "episodes": options.limit},
        "learner": rooms["learner"],
        "critic": {} if groups else rooms["critic"],
    }


def gaps(trainer: Any) -> dict[str, dict[str, float]]:
    """Per agent: mean and largest gap between the engine's log-probs of fresh answers and the learner's."""
    import torch

    from collm.learning.batch import Batch
    from collm.learning.pack import micro_batches, pack_answers

    batch = Batch.of(trainer.collect(), trainer.team.agents)
    found = {}
    for agent, policy in trainer.team.policies.items():
        differences = []
        for micro in micro_batches(pack_answers(batch, agent, policy), 8192, policy.device):
            with torch.no_grad():
                hidden = policy.hidden(micro.ids_BL)[micro.row_K, micro.column_K]
                differences.append((policy.score(hidden, micro.token_K, trainer.plan.sampling) - micro.old_logp_K).abs())
        gap = torch.cat(differences)
        found[agent] = {"mean": gap.mean().item(), "max": gap.max().item(), "tokens": len(gap)}
    return found


def measure_gap(options: argparse.Namespace, form: str, precision: str) -> dict[str, Any]:
    from collm.settings.load import parse_config
    from collm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(parse_config(settings(options, form, "magrpo", precision, folder)), quiet=True)
        before = gaps(trainer)
        trainer.learner.update(trainer.collect(), 0)
        trainer.engine.load(trainer.team)
        return {"before_update": before, "after_update": gaps(trainer)}


def measure_learning(options: argparse.Namespace, algorithm: str) -> dict[str, Any]:
    from collm.cli.evaluate import measured
    from collm.runs.log import read_metrics
    from collm.settings.load import parse_config
    from collm.training.evaluate import evaluate
    from collm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        values = settings(options, "adapters", algorithm, options.precision, folder)
        began = time.monotonic()
        trainer = Trainer(parse_config(values), quiet=True)
        loaded = time.monotonic()
        results = {"before": evaluate(trainer.config, trainer.collector)}
        run = trainer.run()
        trained = time.monotonic()
        results["after"] = evaluate(trainer.config, trainer.collector)
        held_out = {when: measured(result)[0]["reward"].plain() for when, result in results.items()}
        texts = {
            when: [{a: c.text for a, c in e.turns[0].completions.items()} for e in result.episodes[:3]]
            for when, result in results.items()
        }
        lines = read_metrics(run / "metrics.jsonl")
        kept = ("iteration", "joint_actions", "reward/raw", "seconds/collect", "seconds/learn")
        curve = [{key: line[key] for key in kept if key in line} for line in lines]
        return {
            "held_out": held_out, "texts": texts, "curve": curve,
            "seconds_loading": loaded - began, "seconds_training_and_evaluating": trained - loaded,
        }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a Hugging Face folder or hub name")
    add("--data", type=Path, required=True, help="posts as JSON lines with a field post")
    add("--out", type=Path, default=Path(__file__).parent / ".work" / "real", help="where results are kept")
    add("--device", default="cuda", help="default: cuda")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the learning runs (default: bfloat16)")
    add("--iterations", type=int, default=30, help="of each learning run (default: 30)")
    add("--joint-actions", type=int, default=64, help="in one iteration (default: 64)")
    add("--limit", type=int, default=HELD_OUT, help=f"held-out posts (default: {HELD_OUT})")
    add("--minutes", type=float, default=6.0, help="start no further measurement after that time (default: 6)")
    add("--dry-run", action="store_true", help="list what would be measured, and stop")
    options = parser.parse_args()
    options.data = options.data.resolve()
    sys.path.insert(0, str(Path(__file__).parent))
    todo: list[tuple[str, Any]] = [
        (f"gap-{form}-{precision}", lambda form=form, precision=precision: measure_gap(options, form, precision))
        for form in ("adapters", "whole")
        for precision in ("float32", "bfloat16")
    ]
    learning = [(f"learn-{name}", lambda name=name: measure_learning(options, name)) for name in ("magrpo", "collm-cc")]
    todo = [*todo[:2], *learning, *todo[2:]]
    if options.dry_run:
        print("\n".join(name for name, _ in todo))
        return 0
    import torch

    place = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    for name, measure in todo:
        if time.monotonic() > end:
            print(f"{name}: not measured, the time is over")
            continue
        began = time.monotonic()
        try:
            record = measure()
        except Exception as error:  # the other measurements continue
            record = {"error": repr(error)}
        record |= {"on": place, "torch": torch.__version__, "seconds": round(time.monotonic() - began, 2)}
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1))
        shown = {k: v for k, v in record.items() if k not in ("curve", "texts")}
        print(name, json.dumps(shown), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
