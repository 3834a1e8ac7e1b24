"""Teams of models with the shapes of Qwen3-0.6B, 1.7B and 4B on one GPU: tokens and joint actions per second, and memory.

    python benchmarks/gpu.py                                           # whole models, this package's own engine
    python benchmarks/gpu.py --adapters --engines local vllm --reference
    python benchmarks/gpu.py --limit-seconds 400 --out FOLDER          # start no measurement after that time; continue later
    python benchmarks/gpu.py --device cpu --models tiny                # the same code, small enough for any machine

Two agents and a centralized critic train with `collm-cc` for a few iterations. Every agent reads 67 tokens and answers with
--answer-tokens tokens sampled from the whole vocabulary at temperature 1, in one turn. Weights are random, of the named
model's shape and vocabulary size, so that nothing is downloaded; they make every answer full length, and each side checks this.

    collm-local, collm-vllm    this package's trainer, with its own engine or vLLM
    reference                  comlrl 1.3.6's MAAC, unchanged: one answer per call of `generate`
    reference-wide             the same, with up to 32 answers to one prompt per call

One measurement (a model, its form, a side) is a process of its own, and its result a JSON file in --out. Existing results are
not measured again, so the command can be stopped and repeated; failed measurements are repeated last. Running out of memory is
a result. The measured time includes optimizer steps; it excludes loading and a warm-up.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import random
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

try:
    from pettingzoo import ParallelEnv
except ImportError:  # in the reference's environment
    ParallelEnv = object

import matched
from matched import Row, Stopwatch, count_turns, make_reference, peak_memory_mb, surroundings, team_reward

_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960}
_QWEN3 |= {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": _QWEN3 | {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "1.7B": _QWEN3 | {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 6144},
    "4B": _QWEN3 | {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
}
"""Numbers of Qwen3's published configurations. "tiny" is the shape of the model that the package ships."""
NUM_AGENTS = 2
LETTERS = string.ascii_uppercase
"""The characters of answers and observations: one token each, in any context."""
OBSERVATION_LETTERS = 64
WIDE = 32
REFERENCE_TASKS = 8
"""Joint actions measured for the unchanged reference: as many as it learns from at once by default."""
SHORT_OF_MEMORY = ("out of memory", "No available memory", "less than desired GPU memory")


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement, with all its settings."""

    model: str
    form: str
    side: str
    device: str
    precision: str
    answer_tokens: int
    episodes: int
    iterations: int
    micro_batch_tokens: int

    @property
    def name(self) -> str:
        return "-".join((self.device, self.model, self.form, self.side, self.precision))


# --- the work, the same for every side ---------------------------------------------------------------------------------


def observation(task: int, agent: int, turn: int = 0) -> str:
    """The observation of an agent: 64 letters, different for every task and agent."""
    return "".join(random.Random(f"{task} {agent} {turn}").choices(LETTERS, k=OBSERVATION_LETTERS))


def prompt(tokenizer: Any, task: int, agent: int) -> str:
    """The observation as the chat template renders it, up to the beginning of the answer."""
    chat = [{"role": "user", "content": observation(task, agent)}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def make_world(answer_tokens: int, split: str = "train") -> ParallelEnv:
    """The benchmark's environment for collm."""
    return matched.make_world(NUM_AGENTS, 1, observation, answer_tokens)


def shape(name: str) -> Any:
    """The configuration of a model, with the tokens at which the shipped tokenizer begins and ends."""
    from transformers import AutoConfig, Qwen3Config

    from collm import tiny

    shipped = AutoConfig.from_pretrained(tiny.folder())
    if name == "tiny":
        return shipped
    return Qwen3Config(**SHAPES[name], bos_token_id=None, eos_token_id=shipped.eos_token_id, pad_token_id=shipped.pad_token_id)


def build_model(name: str, folder: Path, device: str) -> None:
    """Save a random model in bfloat16 that writes capital letters for any input, with the shipped model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from collm import tiny

    tokenizer = AutoTokenizer.from_pretrained(tiny.folder())
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape(name), dtype=torch.bfloat16)
    only_write(model, tokenizer.convert_tokens_to_ids(list(LETTERS)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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


class Phases:
    """Seconds by phase; the rest of the whole is "other"."""

    def __init__(self, device: str) -> None:
        import torch

        settle: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.watches: defaultdict[str, Stopwatch] = defaultdict(lambda: Stopwatch(settle))

    def __call__(self, phase: str) -> Stopwatch:
        return self.watches[phase]

    def method(self, owner: Any, name: str, phase: str) -> None:
        """Count one object's method as a phase from now on."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.watches[phase]:
                return inner(*args, **kwargs)

        setattr(owner, name, timed)

    def row(self, joint_actions: int, answer_tokens: int) -> Row:
        """Rates from the seconds of the phases "all" and "collect"."""
        seconds = {phase: watch.wall for phase, watch in self.watches.items()}
        whole = seconds.pop("all")
        tokens = joint_actions * NUM_AGENTS * answer_tokens
        return {
            "joint_actions": joint_actions,
            "seconds": whole,
            "joint_actions_per_second": joint_actions / whole,
            "generated_tokens_per_second": tokens / whole,
            "generated_tokens_per_second_of_collecting": tokens / seconds["collect"],
            "seconds_by_phase": seconds | {"other": whole - sum(seconds.values())},
        }


# --- collm ---------------------------------------------------------------------------------------------------------------


def measure_collm(cell: Cell, model: Path) -> Row:
    """`cell.iterations` iterations of collm's trainer after one of warm-up: collect, learn, new weights to the engine."""
    from transformers import AutoTokenizer

    from collm.settings.load import parse_config
    from collm.training.trainer import Trainer

    settings: dict[str, Any] = {
        "run": {"iterations": cell.iterations + 1, "device": cell.device, "tensorboard": False},
        "env": {"name": "gpu:make_world", "answer_tokens": cell.answer_tokens},
        "team": {"model": str(model), "compute": cell.precision},
        "rollout": {
            "engine": cell.side.removeprefix("collm-"),
            "tasks": cell.episodes,
            "max_tokens": cell.answer_tokens,
        },
        "algorithm": {"name": "collm-cc", "teammates": "none"},  # the reference has no difference baseline
        "learner": {"micro_batch_tokens": cell.micro_batch_tokens},
        "evaluation": {"every": 0},
    }
    if cell.form == "adapters":
        settings["team"]["lora"] = {}
    if cell.device == "cpu":
        settings["run"]["threads"] = 1
    tokenizer = AutoTokenizer.from_pretrained(model)
    with tempfile.TemporaryDirectory() as folder:
        settings["run"]["folder"] = folder
        trainer = Trainer(parse_config(settings), quiet=True)
        phases, joint_actions = Phases(cell.device), 0
        for part in trainer.learner.hands.parts:
            phases.method(part, "values", "values")
            phases.method(part, "learn", "critic" if part.name.startswith("critic-") else "agents")
        for trainer.iteration in range(cell.iterations + 1):
            with phases("all"):
                with phases("collect"):
                    groups = trainer.collect()
                with phases("weights"):
                    trainer.engine.rest()
                trainer.learner.update(groups, trainer.iteration)
                with phases("weights"):
                    trainer.engine.load(trainer.team)
            joint_actions += count_turns(groups, cell.answer_tokens)
            prompt_tokens = check_prompts(groups, tokenizer)
            if trainer.iteration == 0:
                phases.watches.clear()
                joint_actions = 0
    return phases.row(joint_actions, cell.answer_tokens) | {"prompt_tokens": prompt_tokens}


def check_prompts(groups: Any, tokenizer: Any) -> int:
    """The number of tokens that agents read, which must be the tokens that the reference's agents read."""
    for episode in (episode for group in groups for episode in group.episodes):
        for number, completion in enumerate(episode.turns[0].completions.values()):
            expected = tokenizer(prompt(tokenizer, episode.task, number))["input_ids"]
            if completion.prompt_ids.tolist() != expected:
                raise AssertionError(f"task {episode.task}: an agent read {completion.prompt_ids.tolist()}, not {expected}")
    return len(expected)


# --- the reference -------------------------------------------------------------------------------------------------------


def measure_reference(cell: Cell, model: Path) -> Row:
    """One call of comlrl's MAACTrainer.train(), after one of warm-up.

    Its settings are its defaults except: one turn, sampling from the whole vocabulary, no early end, no evaluation. It has
    one number format for everything: with "bfloat16", weights, gradients and optimizer state are bfloat16 too.
    """
    import torch
    from comlrl.trainers.actor_critic import MAACConfig, MAACTrainer
    from transformers import AutoTokenizer

    if cell.device == "cpu":
        torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    width = min(WIDE, cell.episodes) if cell.side == "reference-wide" else 1
    num_tasks = 2 if width > 1 else min(REFERENCE_TASKS, cell.episodes)
    counted = 0

    def reward(first: list[str], second: list[str]) -> list[float]:
        nonlocal counted
        counted += len(first)
        return [team_reward(answers, cell.answer_tokens) for answers in zip(first, second, strict=True)]

    args = MAACConfig(
        num_agents=NUM_AGENTS,
        num_turns=1,
        num_generations=width,
        num_train_epochs=1,
        max_new_tokens=cell.answer_tokens,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        early_termination_threshold=None,
        eval_interval=0,
    )
    trainer = MAACTrainer(
        agents=[str(model)] * NUM_AGENTS,
        critic_model=str(model),
        tokenizer=tokenizer,
        reward_func=reward,
        formatters=[
            lambda item, agent=agent, **_: prompt(tokenizer, int(item["prompt"]), agent) for agent in range(NUM_AGENTS)
        ],
        args=args,
        model_config={"torch_dtype": getattr(torch, cell.precision)},
    )
    trainer.verbose = False
    found = {parameter.dtype for part in (*trainer.team.agents, *trainer.critics) for parameter in part.parameters()}
    if found != {getattr(torch, cell.precision)}:
        raise AssertionError(f"the reference holds {found} instead of {cell.precision}")
    phases = Phases(cell.device)
    phases.method(trainer, "_generate", "collect")
    phases.method(trainer, "_update", "update")

    def train(tasks: range) -> None:
        trainer.train_dataset = [{"prompt": str(task)} for task in tasks]
        with phases("all"):
            trainer.train()

    train(range(1))
    phases.watches.clear()
    counted, before = 0, trainer.env_step
    train(range(1, 1 + num_tasks))
    if not counted == trainer.env_step - before == num_tasks * width:
        raise AssertionError(f"the reward saw {counted} joint actions, the trainer counts {trainer.env_step - before}")
    prompt_tokens = len(tokenizer(prompt(tokenizer, 0, 0))["input_ids"])
    return phases.row(counted, cell.answer_tokens) | {"prompt_tokens": prompt_tokens, "answers_per_call": width}


# --- one cell, in a process of its own ------------------------------------------------------------------------------------


def short_of_memory(error: BaseException | None) -> bool:
    """Whether an error or its cause is a lack of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(sign in str(error) for sign in SHORT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def measure(cell: Cell, model: Path) -> Row:
    """A cell's result: the measurement, or that memory was not enough, with the peak of memory in either case."""
    import torch
    import transformers

    random.seed(0)
    torch.manual_seed(0)
    try:
        found = measure_collm(cell, model) if cell.side.startswith("collm-") else measure_reference(cell, model)
        row: Row = {"outcome": "measured"} | found
    except Exception as error:
        if not short_of_memory(error):
            raise
        row = {"outcome": "out of memory", "reason": str(error).strip().split("\n")[0]}
    on_gpu = cell.device == "cuda"
    row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else peak_memory_mb() / 1024
    row["on"] = torch.cuda.get_device_name() if on_gpu else "CPU, one thread"
    return row | {"torch": torch.__version__, "transformers": transformers.__version__}


# --- all cells ------------------------------------------------------------------------------------------------------------


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The requested cells, in the order of measurement: small models first. The reference has no adapters."""
    engines = [f"collm-{engine}" for engine in options.engines]
    reference = [] if options.reference is None else ["reference", "reference-wide"]
    forms = {"whole": [*engines, *reference]} | ({"adapters": engines} if options.adapters else {})
    sizes = options.answer_tokens, options.episodes, options.iterations, options.micro_batch_tokens
    for model, (form, sides) in product(options.models, forms.items()):
        for side in sides:
            yield Cell(model, form, side, options.device, options.precision, *sizes)


def read(cell: Cell, out: Path) -> Row | None:
    """The stored result of a cell; None if its file is missing, broken or has other settings."""
    try:
        found = json.loads((out / f"{cell.name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("cell") == asdict(cell) else None


def ready_model(name: str, options: argparse.Namespace) -> Path:
    """The folder of a model, which is built if it is missing."""
    folder = options.work.resolve() / "models" / name
    if not folder.exists():
        print(f"building {folder}", file=sys.stderr)
        half = folder.with_name(f"{name}.half")
        command = [sys.executable, __file__, "--build", name, "--model", str(half), "--device", options.device]
        subprocess.run(command, env=surroundings(gpu=options.device == "cuda"), check=True, stdout=sys.stderr)
        half.rename(folder)
    return folder


def run_cell(cell: Cell, python: Path, model: Path, options: argparse.Namespace) -> Row:
    """Measure one cell in a process of its own and write its result; its messages go to a log beside the result."""
    log = options.out / f"{cell.name}.log"
    command = [python, __file__, "--cell", json.dumps(asdict(cell)), "--model", model]
    env = surroundings(1 if cell.device == "cpu" else None, gpu=cell.device == "cuda")
    started = time.monotonic()
    row: Row = {"outcome": "failed"}
    try:
        with log.open("w") as messages:
            done = subprocess.run(
                command, env=env, stdout=subprocess.PIPE, stderr=messages, text=True, check=False, timeout=options.cell_seconds
            )
        said = [line for line in done.stdout.splitlines() if line.startswith('{"outcome"')]
        if said:  # a library may crash at exit, after the result is written
            row = json.loads(said[-1])
        elif done.returncode == -signal.SIGKILL:
            row = {"outcome": "out of memory", "reason": "killed by the system, as it does where a machine's own memory ends"}
        else:
            last = log.read_text(errors="replace").strip().split("\n")[-1]
            row["reason"] = f"exit code {done.returncode}: {last}"
    except subprocess.TimeoutExpired:
        row["reason"] = f"not done after {options.cell_seconds:g} seconds"
    row |= {"cell": asdict(cell), "seconds_with_loading": time.monotonic() - started}
    path = options.out / f"{cell.name}.json"
    half = path.with_suffix(".half")
    half.write_text(json.dumps(row, indent=1), encoding="utf-8")
    half.replace(path)
    return row


def told(row: Mapping[str, Any]) -> str:
    """A result as one line."""
    if row["outcome"] != "measured":
        return f"{row['outcome']}: {row['reason']}"
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in row["seconds_by_phase"].items())
    rates = f"{row['generated_tokens_per_second']:>9.1f} {row['joint_actions_per_second']:>9.3f}"
    return f"{rates} {row['peak_memory_gib']:>9.2f}  {phases}"


def show(rows: list[Row], left: list[str]) -> None:
    """All results as a plain table."""
    layout = "{:<6} {:<9} {:<15} {:<9} {}"
    for place in sorted({row.get("on", "no result") for row in rows}):
        print(place)
        rates = "{:>9} {:>9} {:>9}  {}".format("tokens/s", "joint/s", "peak GiB", "seconds")
        print(layout.format("model", "form", "side", "precision", rates))
        for row in rows:
            if row.get("on", "no result") == place:
                cell = row["cell"]
                print(layout.format(cell["model"], cell["form"], cell["side"], cell["precision"], told(row)))
    if left:
        print(f"not measured yet: {', '.join(left)}. The same command goes on there.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, here = parser.add_argument, Path(__file__).parent / ".work"
    add("--models", nargs="+", choices=[*SHAPES, "tiny"], default=list(SHAPES), help="whose shapes (default: %(default)s)")
    add("--adapters", action="store_true", help="measure teams of LoRA adapters on one shared base, too")
    add("--engines", nargs="+", choices=["local", "vllm"], default=["local"], help="which engines (default: local)")
    add("--reference", nargs="?", const="", metavar="PYTHON", help="measure the reference, too: with its Python, or a new one")
    add("--device", choices=["cuda", "cpu"], default="cuda", help="where (default: cuda)")
    add("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of matrix products (default: bfloat16)")
    add("--answer-tokens", type=int, default=128, help="length of every answer (default: 128)")
    add("--episodes", type=int, default=64, help="joint actions in one iteration of collm (default: 64)")
    add("--iterations", type=int, default=2, help="measured iterations of collm (default: 2)")
    add("--micro-batch-tokens", type=int, default=4096, help="tokens in one pass of collm's learner (default: 4096)")
    add("--limit-seconds", type=float, default=math.inf, help="start no measurement after that time (default: no limit)")
    add("--cell-seconds", type=float, default=240, help="end a measurement after that time (default: 240)")
    add("--out", type=Path, default=here / "gpu", metavar="FOLDER", help="where results are kept")
    add("--work", type=Path, default=here, metavar="FOLDER", help="where models and the reference lie")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--cell", help=argparse.SUPPRESS)  # one measurement, in this process
    add("--build", help=argparse.SUPPRESS)  # one model, in this process
    add("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        build_model(options.build, options.model, options.device)
        return 0
    if options.cell:
        print("\n" + json.dumps(measure(Cell(**json.loads(options.cell)), options.model)))
        return 0
    if options.device == "cuda" and (reason := no_gpu()):
        print(f"{reason}; nothing was measured. `--device cpu --models tiny` runs the same code without a GPU.")
        return 0
    return measure_all(options)


def no_gpu() -> str:
    """The reason why no GPU can be used; None if one can."""
    import torch

    return "" if torch.cuda.is_available() else f"no GPU: torch {torch.__version__} sees none on this machine"


def measure_all(options: argparse.Namespace) -> int:
    """Measure what is missing, within the time limit, and show all results. Exit code 1 if a measurement failed."""
    deadline = time.monotonic() + options.limit_seconds
    options.out.mkdir(parents=True, exist_ok=True)
    if "vllm" in options.engines and importlib.util.find_spec("vllm") is None:
        print("the package vllm is not installed here: its measurements are left out", file=sys.stderr)
        options.engines.remove("vllm")
    wanted = list(cells(options))
    known = {cell: row for cell in wanted if (row := read(cell, options.out)) is not None}
    todo = [cell for cell in wanted if known.get(cell, {"outcome": "failed"})["outcome"] == "failed"]
    left: list[str] = []
    for cell in sorted(todo, key=known.__contains__):
        if time.monotonic() >= deadline:
            left.append(cell.name)
            continue
        python = Path(sys.executable)
        if cell.side.startswith("reference"):
            python = Path(options.reference) if options.reference else make_reference(options.work.resolve() / "reference")
        model = ready_model(cell.model, options)
        print(f"measuring {cell.name}", file=sys.stderr)
        known[cell] = run_cell(cell, python, model, options)
        print(f"  {told(known[cell])}", file=sys.stderr)
    rows = [known[cell] for cell in wanted if cell in known]
    if options.json:
        print(json.dumps({"results": rows, "left": left}))
    else:
        show(rows, left)
    return int(any(row["outcome"] == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
