"""Compares the memory that `collm plan` computes with the memory that training takes, on this machine's CPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases whole adapters --json

Every case trains a team of random models for two iterations in a process of its own. Their tokens are words, so that their
text is tokenized to the ids that were sampled, as a trained model's text nearly always is. "Measured" is the process's highest
resident memory minus that after all imports; "planned" is the peak of `collm plan` for the same recipe. The C library returns
every freed block of 64 KiB or more to the system (MALLOC_MMAP_THRESHOLD_); otherwise the measurement would include blocks that
it keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

QWEN: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 1536, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12,
    "num_key_value_heads": 12, "vocab_size": 1536, "tie_word_embeddings": True,
}  # fmt: skip
SMALL: dict[str, Any] = {**QWEN, "num_key_value_heads": 2, "tie_word_embeddings": True}
AGREE = {"env.name": "agree", "env.wording": "terse", "rollout.tasks": 4, "rollout.max_tokens": 8}
BUILD = {"env.name": "str_build", "env.wording": "terse", "env.turns": 2, "rollout.tasks": 6, "rollout.max_tokens": 48}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": (QWEN, AGREE),
    "own critics": (LLAMA, {**AGREE, "algorithm.name": "collm-dc"}),
    "no critic": (
        QWEN,
        {**BUILD, "algorithm.name": "magrpo", "rollout.tasks": 2, "rollout.temperature": 0.7, "rollout.top_p": 0.9},
    ),
    "value heads": (LLAMA, {**BUILD, "algorithm.name": "collm-dc", "critic.body": "policy", "critic.metrics": False}),
    "checkpointing": (LLAMA, {**BUILD, "learner.gradient_checkpointing": True}),
    "adapters": (QWEN, {**BUILD, "env.agents": 3, "team.lora.rank": 16}),
    "one agent": (SMALL, {**BUILD, "env.agents": 1, "algorithm.name": "ac", "rollout.tasks": 8}),
    "reference": (SMALL, {**AGREE, "algorithm.name": "marloo", "algorithm.kl_coef": 0.1, "rollout.tasks": 2, "env.agents": 3}),
}
"""Name -> shape of the models, and settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], Path(options.one[1]))))
        return
    results = {}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", name, folder]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-2000:]}")
        results[name] = found = json.loads(done.stdout.strip().split("\n")[-1])
        if not options.json:
            print(
                f"{name:<14} planned {found['planned_gib']:6.2f} GiB   measured {found['measured_gib']:6.2f} GiB   "
                f"ratio {found['ratio']:.2f}   {found['phase']}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train one case in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from collm.planning.memory import GIB, plan
    from collm.settings.load import apply_overrides, parse_config
    from collm.training.trainer import Trainer

    shape, settings = CASES[name]
    if "team.lora.rank" in settings:
        import peft  # noqa: F401

    kind = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **kind, max_position_embeddings=4096, eos_token_id=3, pad_token_id=0)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / "model")
    words(shape["vocab_size"]).save_pretrained(folder / "model")
    del model
    before = memory("VmRSS")
    reset_peak()
    values: dict[str, Any] = {
        "run": {"iterations": 2, "threads": 1, "folder": str(folder), "name": "run", "tensorboard": False}
    }
    apply_overrides(
        values, {"team.model": str(folder / "model"), "evaluation.every": 0, "algorithm.name": "collm-cc", **settings}
    )
    recipe = parse_config(values)
    Trainer(recipe, quiet=True).run()
    found = plan(recipe)
    measured, planned = (memory("VmHWM") - before) / GIB, found.peak / GIB
    return {"planned_gib": planned, "measured_gib": measured, "ratio": planned / measured, "phase": found.largest.name}


def words(size: int) -> Any:
    """A tokenizer of `size` words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, "<unknown>", *(f"w{i}" for i in range(5, size))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template, padding_side="left"
    )


def memory(field: str) -> int:
    """Bytes of this process: VmRSS is resident now, VmHWM the maximum so far."""
    for line in Path("/proc/self/status").read_text().split("\n"):
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this benchmark reads /proc, so it runs on Linux only.")


def reset_peak() -> None:
    """Reset VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
