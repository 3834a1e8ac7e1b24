"""Seconds of one update of groups of siblings, with what they share read once and with one pass per answer.

    python benchmarks/update.py build/smollm2      # a few minutes on one core
    python benchmarks/update.py build/smollm2 --adapters    # in bfloat16: inputs of layers cast as PEFT does, and as they are

Prompts and answers are random token ids, since their lengths alone decide. Both ways alternate in one process on the same
episodes and weights; the ratio of their processor seconds is the median over the rounds. Printed too: tokens read, and the
largest difference of the gradients relative to their norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from collm.learning.batch import Batch
from collm.learning.credit import Credit
from collm.learning.parts import PolicyPart
from collm.models.policy import Policy
from collm.settings.load import parse_config
from collm.settings.rooms import LoraSettings
from collm.types import Completion, Episode, Group, Sampling, Turn

WORKLOADS = {"quote": (45, 14), "tldr": (400, 60), "long answers": (150, 150)}
"""Name -> (tokens of a prompt, tokens of an answer)."""


def batch_of(policy: Policy, prompt: int, answer: int, groups: int, siblings: int) -> Batch:
    draw = np.random.default_rng(0)
    top = policy.model.config.vocab_size

    def episode(task: int, ids: np.ndarray) -> Episode:
        said = draw.integers(0, top, answer).astype(np.int32)
        completion = Completion("a", "", ids, said, np.zeros(answer, dtype=np.float32))
        return Episode(task, 0, ("a",), turns=[Turn({"a": ""}, {"a": completion}, 0.0, 0.0)], terminated=True)

    prompts = [draw.integers(0, top, prompt).astype(np.int32) for _ in range(groups)]
    return Batch.of([Group(task, [episode(task, ids) for _ in range(siblings)]) for task, ids in enumerate(prompts)], ["a"])


def measured(part: PolicyPart, batch: Batch, *, trees: bool) -> tuple[float, float, torch.Tensor]:
    """(processor seconds, tokens read, gradient) of one update with a learning rate of 0."""
    advantages_ENT = torch.linspace(-1, 1, len(batch.episodes))[:, None, None]
    credit = Credit(advantages_ENT, torch.zeros_like(advantages_ENT), torch.ones_like(advantages_ENT))
    part.policy.__dict__["reads_trees"] = trees
    kept: list[torch.Tensor] = []
    parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
    hook = part.optimizer.register_step_pre_hook(lambda *_: kept.append(torch.cat([p.grad.flatten() for p in parameters])))
    began = time.process_time()
    metrics = part.learn(batch, 0, credit)
    seconds = time.process_time() - began
    hook.remove()
    return seconds, metrics["tokens/policy"], kept[0]


def workload(policy: Policy, name: str, siblings: int, tokens: int) -> tuple[PolicyPart, Batch]:
    prompt, answer = WORKLOADS[name]
    values: dict[str, Any] = {
        "env": {"name": "agree", "agents": 1},
        "algorithm": {"name": "grpo"},
        "learner": {"micro_batch_tokens": 1024},
    }
    part = PolicyPart("a", policy, ["a"], {}, parse_config(values), Sampling(), lr=0.0, head_lr=0.0)
    return part, batch_of(policy, prompt, answer, max(1, tokens // (prompt + answer) // siblings), siblings)


def compare_casts(policy: Policy, name: str, siblings: int, tokens: int, rounds: int) -> None:
    part, batch = workload(policy, name, siblings, tokens)
    ratios = []
    for _ in range(rounds):
        found = []
        for casts in (True, False):
            for layer in policy.adapter.base.layers.values():
                layer.cast_input_dtype_enabled = casts
            found.append(measured(part, batch, trees=True))
        (cast, _, wanted), (plain, read, gradient) = found
        ratios.append(cast / plain)
    print(
        f"{name:<14} G {siblings:<3} answers {len(batch.episodes):<4} tokens {read:.0f}  seconds {cast:.2f} -> {plain:.2f}  "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})  "
        f"gradients {'equal' if torch.equal(wanted, gradient) else 'differ'}",
        flush=True,
    )


def compare(policy: Policy, name: str, siblings: int, tokens: int, rounds: int) -> None:
    prompt, answer = WORKLOADS[name]
    part, batch = workload(policy, name, siblings, tokens)
    ratios = []
    for _ in range(rounds):
        alone, many, wanted = measured(part, batch, trees=False)
        shared, few, found = measured(part, batch, trees=True)
        ratios.append(alone / shared)
    error = float((found - wanted).norm() / wanted.norm())
    print(
        f"{name:<14} G {siblings:<3} prompt {prompt:<4} answer {answer:<4} answers {len(batch.episodes):<4} "
        f"tokens {many:.0f} -> {few:.0f}  seconds {alone:.2f} -> {shared:.2f}  ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})  gradient {error:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a Hugging Face folder, or tiny")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--siblings", nargs="+", type=int, default=[4, 8])
    add("--tokens", type=int, default=4000, help="tokens of an update without sharing (default: 4000)")
    add("--rounds", type=int, default=3)
    add("--adapters", action="store_true", help="compare casts of adapters on a bfloat16 base")
    options = parser.parse_args()
    torch.set_num_threads(1)
    about: dict[str, Any] = {"compute": "bfloat16", "lora": LoraSettings(rank=16)} if options.adapters else {}
    policy = Policy.from_pretrained(options.model, **about)
    for name in options.workloads:
        for siblings in options.siblings:
            (compare_casts if options.adapters else compare)(policy, name, siblings, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
