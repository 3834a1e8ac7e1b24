"""A pre-trained model in collm, in the reference package comlrl 1.3.6 and in bare transformers: speed, and what was learned.

    python benchmarks/real.py                                   # SmolLM2-135M, 160 joint actions per side: about 15 minutes
    python benchmarks/real.py MODEL --device cuda --precision bfloat16 --iterations 4 --tasks 8
    python benchmarks/real.py tiny --iterations 2 --sides collm floor         # any machine, in a minute

MODEL is a Hugging Face folder or hub name (default: build/smollm2, which `make smollm2` makes). Two writers play one turn of
`quote` (recipes/real/quote.toml). Every iteration plays --tasks texts --group times and makes one update.

    collm     its trainer: MAGRPO, whole models
    comlrl    its MAGRPOTrainer, unchanged, in a virtual environment of its own that pip makes
    recipe    collm as the recipe has it: adapters on one bfloat16 base, their own learning rate
    floor     transformers alone: batched `generate`, forward and backward passes of whole rows, AdamW; it learns nothing useful

All sides read the same token ids in the same order: those that collm read. collm and comlrl have the same learning rate,
temperature, number format and group size, and `quote` itself rewards both. Nothing is normalized. collm evaluates every team on
the held-out texts, greedy.

A side is a process of its own. Joint actions per second count collecting, learning and optimizer steps of all iterations after
the first. On a CPU all sides have one thread; joint actions per CPU second depend less on other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matched
from matched import Row, Stopwatch, in_a_process, make_reference

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "real" / "quote.toml"
SIDES = ("collm", "comlrl", "recipe", "floor")
TOKENS_AT_ONCE = 4096
"""Tokens in one forward and backward pass of the floor."""
SHOWN = 3
"""Held-out texts whose answers are kept."""


class Iterations:
    """One stopwatch per iteration, and the rates of all but the first."""

    def __init__(self, device: str):
        self.device, self.watches = device, list[Stopwatch]()

    def __call__(self) -> Stopwatch:
        import torch

        self.watches.append(Stopwatch(torch.cuda.synchronize) if self.device == "cuda" else Stopwatch())
        return self.watches[-1]

    def row(self, joint_actions: int, tokens: int) -> Row:
        """joint_actions, tokens: of every iteration; answers' tokens of all agents."""
        import torch

        counted = self.watches[1:] or self.watches
        seconds, cpu = (sum(getattr(watch, kind) for watch in counted) for kind in ("wall", "cpu"))
        on_gpu = self.device == "cuda"
        return {
            "joint_actions": joint_actions * len(self.watches),
            "joint_actions_per_second": joint_actions * len(counted) / seconds,
            "joint_actions_per_cpu_second": joint_actions * len(counted) / cpu,
            "tokens_per_second": tokens * len(counted) / seconds,
            "seconds_by_iteration": [round(watch.wall, 3) for watch in self.watches],
            "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else matched.peak_memory_mb() / 1024,
            "on": torch.cuda.get_device_name() if on_gpu else "CPU, one thread",
        }


# --- collm ---------------------------------------------------------------------------------------------------------------


def config_of(job: Row, folder: str, models: Mapping[str, str] | None = None) -> Any:
    """The recipe with the job's model and sizes; the side "recipe" keeps its adapters, number format and learning rate."""
    from collm.settings.load import load_config

    overrides = {
        "run.folder": folder,
        "run.iterations": job["iterations"],
        "run.seed": job["seed"],
        "run.device": job["device"],
        "run.trackers": [],
        "team.model": job["model"],
        "rollout.tasks": job["tasks"],
        "rollout.max_tokens": job["answer_tokens"],
        "rollout.temperature": job["temperature"],
        "algorithm.group_size": job["group"],
    }
    if job["side"] != "recipe":
        overrides |= {"team.lora": "none", "team.compute": job["precision"], "learner.lr": job["lr"]}
    if models:
        overrides["team.models"] = models
    return load_config(RECIPE, overrides)


def held_out(trainer: Any) -> Row:
    """The team's reward on the held-out texts with its 95 % interval, and its answers to the first of them."""
    from collm.cli.evaluate import as_record
    from collm.training.evaluate import evaluate

    result = evaluate(trainer.config, trainer.collector)
    shown = [{agent: answer.text for agent, answer in e.turns[0].completions.items()} for e in result.played[:SHOWN]]
    return {"reward": as_record(result)["reward"], "texts": shown}


def measure_collm(job: Row) -> Row:
    """`job["iterations"]` iterations of collm's trainer, held-out rewards before and after, and what its agents read."""
    from collm.planning.memory import plan
    from collm.training.trainer import Trainer

    clock, read, curve = Iterations(job["device"]), [], []
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(job, folder)
        trainer = Trainer(config, quiet=True)
        before = held_out(trainer) if job["evaluate"] else None
        for trainer.iteration in range(job["iterations"]):
            with clock():
                groups = trainer.collect()
                trainer.engine.rest()
                trainer.learner.update(groups, trainer.iteration)
                trainer.engine.load(trainer.team)
            read.append([{"task": group.task, "prompts": prompts_of(group)} for group in groups])
            curve.append(statistics.mean(episode.score for group in groups for episode in group.episodes))
        answers = [a for group in groups for e in group.episodes for a in e.turns[0].completions.values()]
        row = clock.row(job["tasks"] * job["group"], sum(len(answer.token_ids) for answer in answers))
        row |= {"planned_memory_gib": plan(config).peak / 2**30, "curve": curve, "read": read}
        return row | ({"before": before, "after": held_out(trainer)} if job["evaluate"] else {})


def prompts_of(group: Any) -> list[list[int]]:
    """The token ids that each agent read, the same for all siblings."""
    found = [[answer.prompt_ids.tolist() for answer in e.turns[0].completions.values()] for e in group.episodes]
    if failed := [e.failure for e in group.episodes if e.failure]:
        raise AssertionError(f"an episode failed: {failed[0]}")
    if any(prompts != found[0] for prompts in found):
        raise AssertionError("siblings read different prompts")
    return found[0]


def evaluate_folders(job: Row) -> Row:
    """collm's evaluation of the models that comlrl saved."""
    from collm.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        return held_out(Trainer(config_of(job, folder, job["models"]), quiet=True))


# --- comlrl --------------------------------------------------------------------------------------------------------------


def measure_comlrl(job: Row) -> Row:
    """comlrl's MAGRPOTrainer: one call of `train()` per iteration, over its texts. Writes the models to job["save"].

    Its settings are its defaults except those of the job, no normalization, no early end and no evaluation, and one update
    per iteration. The tokenizer gets another padding token: comlrl takes the first padding token in a prompt as the prompt's
    end, and SmolLM2's own occurs in every prompt.
    """
    import torch
    from comlrl.trainers.reinforce import MAGRPOConfig, MAGRPOTrainer
    from transformers import AutoTokenizer

    sys.path.insert(0, str(HERE.parent))
    from collm.envs.quote import Quote

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.pad_token = tokenizer.unk_token or tokenizer.pad_token
    quote, rewards = Quote(), list[float]()

    def text(ids: list[int]) -> str:
        said = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokenizer(said)["input_ids"] != ids or tokenizer.pad_token_id in ids:
            raise AssertionError(f"comlrl would read {tokenizer(said)['input_ids']}, not {ids}")
        return str(said)

    def reward(first: list[str], second: list[str], *, batch_items: list[Row]) -> list[float]:
        found = [play(quote, batch_items[0]["task"], answers) for answers in zip(first, second, strict=True)]
        rewards.extend(found)
        return found

    args = MAGRPOConfig(
        num_agents=2,
        num_turns=1,
        num_generations=job["group"],
        num_train_epochs=1,
        agent_learning_rate=job["lr"],
        max_new_tokens=job["answer_tokens"],
        temperature=job["temperature"],
        top_p=1.0,
        top_k=0,
        advantage_normalization=False,
        early_termination_threshold=None,
        rollout_buffer_size=job["tasks"],
        train_batch_size=job["tasks"],
        eval_interval=0,
    )
    trainer = MAGRPOTrainer(
        agents=[job["model"]] * 2,
        tokenizer=tokenizer,
        reward_func=reward,
        formatters=[lambda item, agent=agent: text(item["prompts"][agent]) for agent in range(2)],
        args=args,
        model_config={"torch_dtype": getattr(torch, job["precision"])},
    )
    trainer.verbose, trainer.device = False, torch.device(job["device"])
    if (found := {p.dtype for agent in trainer.agents for p in agent.parameters()}) != {getattr(torch, job["precision"])}:
        raise AssertionError(f"comlrl holds {found} instead of {job['precision']}")
    clock = Iterations(job["device"])
    for items in job["read"]:
        trainer.train_dataset = items
        with clock():
            trainer.train()
    per_iteration = job["tasks"] * job["group"]
    if not len(rewards) == trainer.env_step == per_iteration * len(job["read"]):
        raise AssertionError(f"the reward saw {len(rewards)} joint actions, the trainer counts {trainer.env_step}")
    if job["evaluate"]:
        trainer.save_model(job["save"])
        for agent in range(2):  # comlrl's padding token goes no further
            AutoTokenizer.from_pretrained(job["model"]).save_pretrained(f"{job['save']}/agent_{agent}")
    curve = [statistics.mean(rewards[i : i + per_iteration]) for i in range(0, len(rewards), per_iteration)]
    return clock.row(per_iteration, per_iteration * 2 * job["answer_tokens"]) | {"curve": curve}


def play(quote: Any, task: int, answers: Iterable[str]) -> float:
    """The environment's reward of one joint action."""
    quote.reset(options={"task": task})
    _, rewards, *_ = quote.step(dict(zip(quote.possible_agents, answers, strict=True)))
    return float(next(iter(rewards.values())))


# --- the floor -----------------------------------------------------------------------------------------------------------


def measure_floor(job: Row) -> Row:
    """Batched calls of transformers on the same prompts: full-length answers, then one update towards all of them."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).to(job["device"]) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=job["lr"]) for model in models]
    length, clock = job["answer_tokens"], Iterations(job["device"])
    for items in job["read"]:
        with clock(), torch.autocast(job["device"], torch.bfloat16, enabled=job["precision"] == "bfloat16"):
            for agent, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
                prompts = [item["prompts"][agent] for item in items for _ in range(job["group"])]
                width = max(map(len, prompts))
                ids_BL = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts], device=job["device"])
                mask_BL = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=job["device"])
                with torch.no_grad():
                    ids_BL = model.generate(
                        input_ids=ids_BL, attention_mask=mask_BL, do_sample=True, temperature=job["temperature"], top_k=0,
                        top_p=1.0, min_new_tokens=length, max_new_tokens=length,
                    )  # fmt: skip
                mask_BL = torch.nn.functional.pad(mask_BL, (0, length), value=1)
                rows = max(1, TOKENS_AT_ONCE // ids_BL.shape[1])
                optimizer.zero_grad()
                for ids, mask in zip(ids_BL.split(rows), mask_BL.split(rows), strict=True):
                    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                    logits = model.lm_head(hidden[:, -length - 1 : -1]).float()
                    (-logits.log_softmax(-1).gather(-1, ids[:, -length:, None]).sum() / len(ids_BL)).backward()
                optimizer.step()
    return clock.row(len(prompts), len(prompts) * 2 * length)


# --- all sides -----------------------------------------------------------------------------------------------------------

MEASURE = {
    "collm": measure_collm,
    "recipe": measure_collm,
    "comlrl": measure_comlrl,
    "floor": measure_floor,
    "evaluate": evaluate_folders,
}


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    """After each side: the settings, the rows of all sides so far, and collm's rates divided by the others'."""
    names = ("iterations", "tasks", "group", "answer_tokens", "device", "precision", "lr", "temperature", "seed")
    settings: Row = {name: getattr(options, name) for name in names}
    job = settings | {"evaluate": not options.no_evaluation, "model": local(options.model)}
    first = next((side for side in options.sides if side in ("collm", "recipe")), "collm")
    rows: dict[str, Row] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for side in (first, *(side for side in options.sides if side != first)):
            python = reference_python(options) if side == "comlrl" else Path(sys.executable)
            row = process(job | {"side": side, "save": folder}, python)
            job["read"] = row.pop("read", job.get("read"))  # every side reads what the first read
            if side == "comlrl" and job["evaluate"] and "failed" not in row:
                models = {agent: f"{folder}/agent_{i}" for i, agent in enumerate(("first", "second"))}
                after = process(job | {"side": "evaluate", "models": models}, Path(sys.executable))
                row |= {"before": rows[first]["before"], "after": after}
            rows[side] = row
            print(f"  {side}: {line(row)}", file=sys.stderr)
            yield {"model": options.model, "settings": settings, "sides": rows, "ratios": ratios(rows)}
            if job["read"] is None:
                raise SystemExit(f"{first} failed, and the other sides read its prompts")


def process(job: Row, python: Path) -> Row:
    """One side's row, measured in a process of its own; {"failed": reason} if that ends with an error."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(job))
        file.flush()
        threads, gpu = (None, True) if job["device"] == "cuda" else (1, False)
        try:
            row: Row = in_a_process([python, __file__, "--job", file.name], threads, gpu=gpu)
        except SystemExit as error:
            return {"failed": str(error)}
        return row


def local(model: str) -> str:
    """The folder of the shipped model, which comlrl and transformers do not know by its name."""
    from collm import tiny

    return str(tiny.folder()) if model == "tiny" else model


def reference_python(options: argparse.Namespace) -> Path:
    return options.reference or make_reference(options.work.resolve() / "reference")


def ratios(rows: Mapping[str, Row]) -> Row:
    """collm's joint actions per second and per CPU second, divided by those of every other side."""
    units = ("joint_actions_per_second", "joint_actions_per_cpu_second")
    collm = rows.get("collm", {})
    others = {side: row for side, row in rows.items() if side != "collm" and units[0] in row and units[0] in collm}
    return {f"collm / {side}": {unit: collm[unit] / row[unit] for unit in units} for side, row in others.items()}


def line(row: Row) -> str:
    """A side's row as one line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    rates = f"{row['joint_actions_per_second']:.2f} joint actions/s, {row['joint_actions_per_cpu_second']:.2f} per CPU second"
    said = f"{rates}, {row['peak_memory_gib']:.2f} GiB, median iteration {statistics.median(row['seconds_by_iteration']):.1f} s"
    for when in ("before", "after"):
        if when in row:
            reward = row[when]["reward"]
            said += f"; held-out {when} {reward['mean']:.3f} [{reward['low']:.3f}, {reward['high']:.3f}]"
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", nargs="?", default="build/smollm2", help="a Hugging Face folder or hub name (default: build/smollm2)")
    add("--sides", nargs="+", choices=SIDES, default=["collm", "comlrl", "floor"], help="default: collm comlrl floor")
    add("--iterations", type=int, default=10, help="iterations, each with one update (default: 10)")
    add("--tasks", type=int, default=2, help="texts in one iteration (default: 2)")
    add("--group", type=int, default=8, help="joint actions per text (default: 8)")
    add("--answer-tokens", type=int, default=14, help="longest answer (default: 14)")
    add("--temperature", type=float, default=0.7, help="of sampling (default: 0.7)")
    add("--lr", type=float, default=2e-5, help="learning rate of whole models (default: 2e-5)")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="of collm, comlrl and floor (default: float32)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--seed", type=int, default=0, help="default: 0")
    add("--no-evaluation", action="store_true", help="speed alone")
    add("--reference", type=Path, metavar="PYTHON", help="a Python that has comlrl, instead of making an environment")
    add("--work", type=Path, default=HERE / ".work", metavar="DIR", help="folder of the reference's environment")
    add("--out", type=Path, metavar="FILE", help="write the results there as JSON after each side")
    add("--job", type=Path, help=argparse.SUPPRESS)  # one side, in this process
    options = parser.parse_args()
    if options.job:
        return measure_here(json.loads(options.job.read_text()))
    options.work.mkdir(parents=True, exist_ok=True)
    for report in measure_all(options):
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return int(any("failed" in row for row in report["sides"].values()))


def measure_here(job: Row) -> int:
    import torch

    random.seed(job["seed"])
    torch.manual_seed(job["seed"])
    if job["device"] == "cpu":
        torch.set_num_threads(1)
    print("\n" + json.dumps(MEASURE[job["side"]](job)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
