"""Compares the memory that `collm plan` computes with the memory that training takes, on this machine's CPU.

    python benchmarks/memory.py
    python benchmarks/memory.py --cases whole adapters --json

Every case is `collm train` on random models, started as a user starts it. Their tokens are words, so that their text is
tokenized to the ids that were sampled, as a trained model's text nearly always is; the words name colours, so that returns
differ and every model learns. "Measured" is the process's highest resident memory minus that of a process which has imported
what training imports and made one pass of the built-in model; "planned" is the peak of `collm plan` for the same recipe.
"Grown" is the highest resident memory of the last iteration divided by that of the second: 1 if nothing accumulates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
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
TWICE = {**AGREE, "env.turns": 2, "rollout.tasks": 6, "rollout.max_tokens": 48}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "whole": (QWEN, AGREE),
    "own critics": (LLAMA, {**AGREE, "algorithm.name": "collm-dc"}),
    "no critic": (
        QWEN,
        {
            **TWICE,
            "algorithm.name": "magrpo",
            "rollout.tasks": 16,
            "rollout.max_tokens": 8,
            "rollout.temperature": 0.7,
            "rollout.top_p": 0.9,
        },
    ),
    "value heads": (LLAMA, {**TWICE, "algorithm.name": "collm-dc", "critic.body": "policy", "critic.metrics": False}),
    "checkpointing": (LLAMA, {**TWICE, "learner.gradient_checkpointing": True}),
    "adapters": (QWEN, {**TWICE, "env.agents": 3, "team.lora.rank": 16}),
    "bfloat16 adapters": (SMALL, {**TWICE, "rollout.tasks": 64, "team.lora.rank": 16, "team.compute": "bfloat16"}),
    "one agent": (SMALL, {**TWICE, "env.agents": 1, "algorithm.name": "ac", "rollout.tasks": 8}),
    "reference": (SMALL, {**AGREE, "algorithm.name": "marloo", "algorithm.kl_coef": 0.1, "rollout.tasks": 2, "env.agents": 3}),
}
"""Name -> shape of the models, and settings."""


IMPORTS = """
import peft, torch, transformers, collm.training.trainer
from pathlib import Path
from collm.models.policy import Policy
torch.set_num_threads(1)
Policy.from_pretrained("tiny", compute="bfloat16").hidden(torch.arange(8)[None]).sum().backward()
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().split("\\n") if line.startswith("VmRSS:")))
"""
"""Prints the resident memory, in KiB, of a process that has imported what training imports and computed with it once."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--iterations", type=int, default=4, help="of each case (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("this benchmark reads /proc, so it runs on Linux only.")
    imported = int(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout) << 10
    results = {}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = found = measure(name, Path(folder), options.iterations, imported)
        if not options.json:
            print(
                f"{name:<18} planned {found['planned_gib']:6.2f} GiB   measured {found['measured_gib']:6.2f} GiB   "
                f"ratio {found['ratio']:.2f}   grown {found['grown']:.2f}   {found['phase']}",
                flush=True,
            )
    if options.json:
        print(json.dumps(results))


def measure(name: str, folder: Path, iterations: int, imported: int) -> dict[str, Any]:
    """Train one case. imported: bytes that a process takes for its imports."""
    from collm.planning.memory import GIB, plan
    from collm.settings.load import apply_overrides, parse_config

    shape, settings = CASES[name]
    make_model(shape, folder / "model")
    run = {"iterations": iterations, "threads": 1, "folder": str(folder), "name": "run", "trackers": [], "device": "cpu"}
    overrides = {f"run.{key}": value for key, value in run.items()}
    algorithm = {"algorithm.name": "collm-cc", "critic.body": "auto"}
    overrides |= {"team.model": str(folder / "model"), "evaluation.every": 0, **algorithm, **settings}
    (folder / "recipe.toml").write_text("")
    words = [word for key, value in overrides.items() for word in (f"--{key}", json.dumps(value))]
    peaks = train([str(folder / "recipe.toml"), *words], folder / "run" / "metrics.jsonl")
    values: dict[str, Any] = {}
    apply_overrides(values, overrides)
    found = plan(parse_config(values))
    measured, planned = (max(peaks) - imported) / GIB, found.peak / GIB
    return {
        "planned_gib": planned,
        "measured_gib": measured,
        "ratio": planned / measured,
        "grown": (peaks[-1] - imported) / (peaks[1] - imported),
        "phase": found.largest.name,
    }


def train(words: list[str], metrics: Path) -> list[int]:
    """Run `collm train`; returns the highest resident memory, in bytes, of each iteration (the first includes the start)."""
    command = [sys.executable, "-m", "collm.cli.main", "train", *words]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peaks = [0]
        while process.poll() is None:
            time.sleep(0.02)
            with suppress(OSError):  # not there yet, or just ended
                done = metrics.read_text().count("\n") if metrics.exists() else 0  # its first line is of the start
                peaks[-1] = max(peaks[-1], highest(process.pid))
                if done > len(peaks):
                    peaks.append(0)
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # VmHWM, the highest so far, begins anew
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"collm train failed: {errors.read()[-2000:]}")
    return peaks[:-1]  # the last is of saving the team


def highest(pid: int) -> int:
    """A process's highest resident memory, in bytes; 0 when it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next((int(line.split()[1]) << 10 for line in status.split("\n") if line.startswith("VmHWM:")), 0)


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """Save a random model of a shape and a tokenizer of words."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {key: value for key, value in shape.items() if key != "model_type"}
    config = AutoConfig.for_model(shape["model_type"], **kind, max_position_embeddings=4096, eos_token_id=3, pad_token_id=0)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words(shape["vocab_size"]).save_pretrained(folder)


def words(size: int) -> Any:
    """A tokenizer of `size` words, which name colours, with a chat template that has a default system message."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from collm.envs.agree import COLOURS

    special = ["<pad>", "<user>", "<assistant>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, "<unknown>", *(f"{COLOURS[i % 4]}.{i}" for i in range(5, size))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    template = (
        "{% if messages[0]['role'] != 'system' %}<user>one two three four five six seven eight<end>{% endif %}"
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template, padding_side="left"
    )


if __name__ == "__main__":
    main()
