"""One GPU in at most ten minutes: does it compute the same, learn, fit the plan, and how fast is it?

    python benchmarks/gpu.py                                    # build/smollm2, then models of Qwen3's shapes
    python benchmarks/gpu.py MODEL --out FOLDER --only speed-0.6B
    python benchmarks/gpu.py --dry-run                          # what it would do: cells, order, seconds, files
    python benchmarks/gpu.py tiny --device cpu --small --only gap-adapters-float32      # the same code on any machine

The cells, the most important first:

    tests                quick tests that play and train on the GPU
    gap-FORM-PRECISION   |log-prob of the engine - log-prob of the learner| of fresh samples, before and after an update
    learn                recipes/real/quote.toml: held-out reward before and after, and the curve
    speed-MODEL          benchmarks/real.py: joint actions per second of collm, comlrl 1.3.6 and bare transformers, and the peak
                         of memory beside what `collm plan` computes; SmolLM2 is MODEL itself, the others have the shapes of
                         Qwen3-0.6B and 1.7B and random weights

Every cell has a limit in seconds and is a process of its own. Its result is written to --out as JSON before the next begins; a
cell that has one is not repeated unless it failed. Without a GPU the cells are listed, and nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import real
from matched import Row, make_reference, surroundings

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SECONDS = 600
TESTS = (
    "tests/engines/test_kv_cache.py",
    "tests/learning/test_pack.py",
    "tests/training/test_evaluate.py",
    "tests/training/test_learning.py::test_two_agents_agree",
)
_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3 |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": _QWEN3 | {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": _QWEN3 | {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
}
"""Numbers of Qwen3's published configurations. "tiny" is the shape of the model that the package ships."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement: commands, the last of which prints its result as JSON on its last line, or anything else."""

    name: str
    what: str
    seconds: int
    """The measurement on a GPU is ended after that time."""
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[Path, ...] = ()
    """Files without which it is left out."""


def cells(options: argparse.Namespace) -> list[Cell]:
    """All cells, in the order of measurement."""
    python, model, small = sys.executable, options.model, options.small
    folder = () if model == "tiny" else (ROOT / model,)
    sides = ("--sides", "collm", "floor") if small else ("--sides", "collm", "comlrl", "floor")
    learning = ("--iterations", "2", "--tasks", "1") if small else ("--iterations", "20", "--tasks", "4")
    sizes = (*sides, *(("--iterations", "2", "--tasks", "2") if small else ("--iterations", "4", "--tasks", "8")))

    def script(name: str, *arguments: object) -> tuple[str, ...]:
        return (python, str(HERE / name), *map(str, arguments), "--device", options.device)

    def gap(form: str, precision: str) -> Cell:
        what = f"log-probs of engine and learner: {form}, {precision}"
        return Cell(f"gap-{form}-{precision}", what, 45, (script("gpu.py", model, "--gap", form, precision),), folder)

    def sides_by_side(cell: str, model: object, *arguments: str) -> tuple[str, ...]:
        places = ("--work", options.work, "--out", sides_of(cell, options))
        return script("real.py", model, "--precision", "bfloat16", *places, *arguments)

    def speed(shape: str) -> Cell:
        name, made = f"speed-{shape}", options.work / "models" / ("tiny" if small else shape)
        measure = sides_by_side(name, made, *sizes, "--answer-tokens", "64", "--no-evaluation")
        return Cell(name, f"the same, Qwen3-{shape}'s shape", 120, (script("gpu.py", "--build", made.name, made), measure))

    learn = sides_by_side("learn", model, "--sides", "recipe", *learning)
    smollm2 = sides_by_side("speed-SmolLM2", model, *sizes)
    found = [
        Cell("tests", "quick tests that play and train", 75, ((python, "-m", "pytest", "-q", "-x", *TESTS),)),
        gap("adapters", "float32"),
        gap("whole", "float32"),
        Cell("learn", "recipes/real/quote.toml, with its curve", 150, (learn,), folder),
        Cell("speed-SmolLM2", "speed and memory: " + " ".join(sides[1:]), 100, (smollm2,), folder),
        *map(speed, SHAPES),
        gap("adapters", "bfloat16"),
        gap("whole", "bfloat16"),
    ]
    return [cell for cell in found if not options.only or cell.name in options.only]


def sides_of(name: str, options: argparse.Namespace) -> Path:
    """The file to which a cell's real.py writes the sides measured so far."""
    return Path(options.out / f"{name}.sides")


# --- models of a shape ----------------------------------------------------------------------------------------------------


def shape(name: str) -> Any:
    """The configuration of a model, with the tokens at which the shipped tokenizer begins and ends."""
    from transformers import AutoConfig, Qwen3Config

    from collm import tiny

    shipped = AutoConfig.from_pretrained(tiny.folder())
    if name == "tiny":
        return shipped
    return Qwen3Config(**SHAPES[name], bos_token_id=None, eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id)


def build_model(name: str, folder: Path, device: str) -> None:
    """Save a random bfloat16 model that writes words of quote's texts for any input, with the shipped model's tokenizer.

    So every answer has its full length, and rewards differ.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from collm import tiny
    from collm.envs.quote_texts import texts

    if folder.exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape(name), dtype=torch.bfloat16)
    ids = {i for text in texts("train") for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    only_write(model, sorted(i for i in ids if tokenizer.decode([i])[0] == " " and tokenizer.decode([i])[1:].isalpha()))
    half = folder.with_name(f"{folder.name}.half")
    model.save_pretrained(half)
    tokenizer.save_pretrained(half)
    half.rename(folder)


def only_write(model: Any, tokens: list[int]) -> None:
    """Change a Qwen3 model, its embeddings tied or not, so that every other token has probability 0 in float32.

    Two dimensions of the residual stream are taken. Every embedding has 10 in dimension 1. From it, one neuron of the first
    layer writes a number into dimension 0 that exceeds all others, so that the last normalization leaves about the root of
    the width there. In the vocabulary head dimension 0 is negative for every other token: about -140 in logits, below the
    -104 at which a float32 probability vanishes. No other neuron or head writes to the two dimensions. A few small updates
    do not change that.
    """
    import torch

    with torch.no_grad():
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        root = math.sqrt(embeddings.shape[1])
        for weight in (embeddings, head):
            weight[:, 0] = -140 / root
            weight[tokens, 0] = 0
        embeddings[:, 1] = 10
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:2] = 0
            layer.mlp.down_proj.weight[:2] = 0
        first = model.model.layers[0].mlp
        for projection in (first.gate_proj, first.up_proj):
            projection.weight[0] = 0
            projection.weight[0, 1] = 8 / root
        first.down_proj.weight[0, 0] = 10_000


# --- log-probs of engine and learner --------------------------------------------------------------------------------------


def measure_gap(model: str, form: str, precision: str, device: str) -> Row:
    """Per agent: mean and largest gap before and after an update of the recipe, with 32 joint actions each."""
    from collm.settings.load import load_config
    from collm.training.trainer import Trainer

    overrides = {"team.model": model, "team.compute": precision, "run.device": device, "run.trackers": []}
    if form == "whole":
        overrides |= {"team.lora": "none", "learner.lr": 2e-5}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(load_config(real.RECIPE, overrides | {"run.folder": folder}), quiet=True)
        before = gaps(trainer)
        trainer.learner.update(trainer.collect(), 0)
        trainer.engine.load(trainer.team)
        return {"before_update": before, "after_update": gaps(trainer)}


def gaps(trainer: Any) -> dict[str, dict[str, float]]:
    """Agent -> mean and largest gap over the tokens of answers sampled now, and their number."""
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


# --- all cells ------------------------------------------------------------------------------------------------------------


def list_cells(todo: list[Cell], options: argparse.Namespace) -> None:
    """What would be measured, in order, with limits and missing files."""
    print(f"{'':3}{'cell':<24}{'at most':>8}  {'what':<50} needs")
    for number, cell in enumerate(todo, start=1):
        needs = ", ".join(f"{place(path)} ({'here' if path.exists() else 'missing'})" for path in cell.needs) or "-"
        print(f"{number:<3}{cell.name:<24}{cell.seconds:>6} s  {cell.what:<50} {needs}")
    print(f"All cells end after {options.limit_seconds:g} s together. Results: {place(options.out)}/CELL.json.")
    print("Before the clock starts, pip makes the environment of comlrl 1.3.6, or --reference names a Python that has it.")


def place(path: Path) -> str:
    """A path as a person would type it in the checkout."""
    path = path.absolute()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def measure_all(todo: list[Cell], options: argparse.Namespace) -> int:
    """Measure what has no result, within the limit. Exit code 1 if a measurement failed."""
    options.out.mkdir(parents=True, exist_ok=True)
    if not options.small and any("comlrl" in cell.what for cell in todo):
        options.reference = options.reference or make_reference(options.work.resolve() / "reference")
    deadline, failed = time.monotonic() + options.limit_seconds, 0
    for cell in todo:
        path = options.out / f"{cell.name}.json"
        row = json.loads(path.read_text()) if path.exists() else {}
        if row.get("outcome") != "measured":
            left = deadline - time.monotonic()
            row = run_cell(cell, min(cell.seconds, left) if options.device == "cuda" else left, options)
            half = path.with_suffix(".half")
            half.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
            half.replace(path)
        failed += row["outcome"] == "failed"
        shown = {name: value for name, value in row.items() if name not in ("sides", "settings", "said")}
        print(cell.name, json.dumps(shown), row.get("said", ""), flush=True)
        for side, found in row.get("sides", {}).items():
            print(f"  {side}: {real.line(found)}", flush=True)
    return int(failed > 0)


def run_cell(cell: Cell, seconds: float, options: argparse.Namespace) -> Row:
    """The result of one cell's commands; messages go to a log beside it."""
    if missing := [place(path) for path in cell.needs if not path.exists()]:
        return {"outcome": "left out", "reason": f"missing: {', '.join(missing)}"}
    if seconds <= 0:
        return {"outcome": "left out", "reason": "the time was over"}
    env = surroundings(1 if options.device == "cpu" else None, gpu=options.device == "cuda")
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT)])}
    row: Row = {"outcome": "measured"}
    started, text, sides = time.monotonic(), "", sides_of(cell.name, options)
    sides.unlink(missing_ok=True)
    with (options.out / f"{cell.name}.log").open("w") as log:
        for command in cell.commands:
            command = (*command, "--reference", str(options.reference)) if "comlrl" in command else command
            code, text = limited(command, env, log, seconds - (time.monotonic() - started))
            if code:
                log.write(text)
                last = (Path(log.name).read_text(errors="replace").strip() or text).split("\n")[-1]
                reason = f"not done after {seconds:.0f} seconds" if code == -signal.SIGKILL else f"exit code {code}: {last}"
                row |= {"outcome": "failed", "reason": reason}
                break
    row["seconds"] = round(time.monotonic() - started, 1)
    if sides.exists():  # also of a command that was ended
        return row | json.loads(sides.read_text())
    last = text.split("\n")[-1]
    return row | (json.loads(last) if last.startswith("{") else {"said": last})


def limited(command: tuple[str, ...], env: dict[str, str], log: IO[str], seconds: float) -> tuple[int, str]:
    """(exit code, output) of a command; after `seconds` it and what it started are killed."""
    options: dict[str, Any] = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": log, "text": True}
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            text, _ = process.communicate(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
        return process.returncode, text.strip()


def no_gpu() -> str:
    """The reason why no GPU can be used; empty if one can."""
    import torch

    return "" if torch.cuda.is_available() else f"no GPU: torch {torch.__version__} sees none on this machine"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, work = parser.add_argument, HERE / ".work"
    add("model", nargs="?", default="build/smollm2", help="a folder of a chat model (default: build/smollm2)")
    add("--only", nargs="+", metavar="CELL", help="measure these cells alone")
    add("--dry-run", action="store_true", help="list the cells, and stop")
    add("--small", action="store_true", help="few iterations, no comlrl, and the tiny model in place of Qwen3's shapes")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    add("--limit-seconds", type=float, default=SECONDS, help=f"end after that time (default: {SECONDS})")
    add("--out", type=Path, default=work / "gpu", metavar="FOLDER", help="where results are kept")
    add("--work", type=Path, default=work, metavar="FOLDER", help="where models and the reference lie")
    add("--reference", type=Path, metavar="PYTHON", help="a Python that has comlrl, instead of making an environment")
    add("--build", nargs=2, metavar=("SHAPE", "FOLDER"), help=argparse.SUPPRESS)  # one model, in this process
    add("--gap", nargs=2, metavar=("FORM", "PRECISION"), help=argparse.SUPPRESS)  # one measurement, in this process
    options = parser.parse_args()
    if options.build:
        build_model(options.build[0], Path(options.build[1]), options.device)
        return 0
    if options.gap:
        print("\n" + json.dumps(measure_gap(options.model, *options.gap, options.device)))
        return 0
    options.out, options.work = options.out.absolute(), options.work.absolute()
    todo = cells(options)
    reason = no_gpu() if options.device == "cuda" else ""
    if options.dry_run or reason:
        if reason:
            print(f"{reason}; nothing is measured. With one, this would be:")
        list_cells(todo, options)
        return 0
    return measure_all(todo, options)


if __name__ == "__main__":
    raise SystemExit(main())
