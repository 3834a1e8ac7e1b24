"""CPU seconds of decoding: draws with top-p and top-k, answers in float32 and bfloat16, and answers of adapters in one batch
and in one batch each; sides alternate in one process.

    python benchmarks/decoding.py                                        # all; draws are at a vocabulary of 152,000
    python benchmarks/decoding.py --model build/smollm2 --only answers   # answers of this model at batch 32
    python benchmarks/decoding.py --model build/smollm2 --only adapters  # adapters on it

Peaked logits have an entropy of about 2 nats, as SmolLM2's do while it answers. Every number is the median over the rounds;
brackets hold the smallest and the largest ratio of a round.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from collm.algorithms.logprobs import sample
from collm.engines.local import Segment, decode
from collm.models.adapters import Base
from collm.models.policy import Policy
from collm.settings.rooms import LoraSettings
from collm.types import Sampling

ROWS, VOCABULARY = 16, 152_000
PROMPT, ANSWER = 60, 16


def alternate(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of every side."""
    return {name: statistics.median(seconds) for name, seconds in measure(sides, rounds).items()}


def measure(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side in each round; one more round comes first as a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(1 + rounds):
        for name, side in sides.items():
            started = time.process_time()
            side()
            seconds[name].append(time.process_time() - started)
    return {name: measured[1:] for name, measured in seconds.items()}


def sorting_all(logits_BV: torch.Tensor, uniforms_B: torch.Tensor, top_p: float) -> torch.Tensor:
    """A draw that sorts the whole vocabulary."""
    values_BV, order_BV = torch.sort(logits_BV, dim=-1, descending=True, stable=True)
    probs_BV = torch.softmax(values_BV, dim=-1)
    kept_BV = torch.cumsum(probs_BV, dim=-1) - probs_BV < top_p
    outside_BV = torch.ones_like(kept_BV).scatter(-1, order_BV, ~kept_BV)
    tokens_B, _ = sample(logits_BV.masked_fill(outside_BV, float("-inf")), uniforms_B, temperature=1, top_p=1, top_k=0)
    return tokens_B


def draws(rounds: int) -> None:
    """Prints the time of one draw for each row, relative to a draw from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    normal_BV = torch.randn(ROWS, VOCABULARY, generator=generator)
    uniforms_B = torch.rand(ROWS, generator=generator)
    kinds = {"peaked": 2.2 * normal_BV.sign() * normal_BV.abs() ** 1.5, "flat": 0.5 * normal_BV, "equal": 0 * normal_BV}
    for kind, logits_BV in kinds.items():

        def draw(top_p: float, top_k: int, logits_BV: torch.Tensor = logits_BV) -> Callable[[], object]:
            return lambda: sample(logits_BV, uniforms_B, temperature=1.0, top_p=top_p, top_k=top_k)

        sides: dict[str, Callable[[], object]] = {
            "top-p 1": draw(1.0, 0),
            "top-p 0.6": draw(0.6, 0),
            "top-p 0.95": draw(0.95, 0),
            "top-k 20": draw(1.0, 20),
            "top-p 0.6, all sorted": lambda logits_BV=logits_BV: sorting_all(logits_BV, uniforms_B, 0.6),  # type: ignore[misc]
        }
        seconds = alternate(sides, rounds)
        plain = seconds["top-p 1"]
        for name, measured in seconds.items():
            print(f"{kind:8} {name:24} {1e3 * measured / ROWS:8.3f} ms per row   x{measured / plain:.2f}", flush=True)


def answers(model: str, rows: int, rounds: int) -> None:
    """Prints the time of answers in both formats; autocast casts all weights at each token, the engine's copy is cast once."""
    exact, half = Policy.from_pretrained(model), Policy.from_pretrained(model, compute="bfloat16")
    ready = half.for_generation()
    numbers = np.random.default_rng(0)
    prompts = [numbers.integers(0, len(exact.tokenizer), PROMPT).astype(np.int32) for _ in range(rows)]
    uniforms_BT = torch.from_numpy(numbers.random((rows, ANSWER), dtype=np.float32))

    def side(policy: Policy, length: int) -> Callable[[], object]:
        policy.chat.stop_ids = []
        return lambda: decode([Segment(policy, prompts, uniforms_BT[:, :length], Sampling(max_tokens=length))])

    policies = {"float32": exact, "bfloat16, autocast": half, "bfloat16, cast once": ready}
    seconds = alternate({f"{n} {t}": side(p, t) for n, p in policies.items() for t in (1, ANSWER)}, rounds)
    first = {name: seconds[f"{name} 1"] for name in policies}
    whole = {name: seconds[f"{name} {ANSWER}"] for name in policies}
    steps = {name: (whole[name] - first[name]) / (ANSWER - 1) for name in policies}
    for name in policies:
        print(
            f"{name:20} prompts {first[name]:.2f} s, a step {steps[name]:.3f} s, as fast as float32: "
            f"steps x{steps['float32'] / steps[name]:.2f}, all x{whole['float32'] / whole[name]:.2f}"
        )


def adapters(model: str, num: int, rows: int, siblings: int, rounds: int) -> None:
    """Prints how many times as fast one batch for `num` adapters of `rows` rows is as one batch each."""
    base = Base.from_pretrained(model, dtype="bfloat16")
    numbers = np.random.default_rng(0)
    segments = []
    for n in range(num):
        policy = Policy(base.model, base.tokenizer, compute="bfloat16", adapter=base.add(LoraSettings(), n))
        policy.chat.stop_ids = []
        prompts = [numbers.integers(0, len(base.tokenizer), PROMPT).astype(np.int32) for _ in range(rows // siblings)]
        uniforms_BT = torch.from_numpy(numbers.random((rows, ANSWER), dtype=np.float32))
        segments.append(Segment(policy, prompts * siblings, uniforms_BT, Sampling(max_tokens=ANSWER)))

    def short(segment: Segment) -> Segment:
        return replace(segment, uniforms_BT=segment.uniforms_BT[:, :1], sampling=Sampling(max_tokens=1))

    sides: dict[str, Callable[[], object]] = {
        "each, first token": lambda: [decode([short(segment)]) for segment in segments],
        "one, first token": lambda: decode(list(map(short, segments))),
        "each": lambda: [decode([segment]) for segment in segments],
        "one": lambda: decode(segments),
    }
    seconds = {name: np.array(measured) for name, measured in measure(sides, rounds).items()}
    steps = {name: (seconds[name] - seconds[f"{name}, first token"]) / (ANSWER - 1) for name in ("each", "one")}
    for what, each, one in (
        ("first token", seconds["each, first token"], seconds["one, first token"]),
        ("a step", steps["each"], steps["one"]),
        (f"answers of {ANSWER}", seconds["each"], seconds["one"]),
    ):
        ratios = each / one
        print(
            f"{num} x {rows} rows, {siblings} per prompt: {what:13} {np.median(each):.3f} s, one batch {np.median(one):.3f} s:"
            f" x{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help="measure answers of this model and of adapters on it too")
    parser.add_argument("--only", choices=("draws", "answers", "adapters"))
    parser.add_argument("--rows", type=int, default=32, help="prompts in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if options.only in (None, "draws"):
            draws(options.rounds)
        if options.model and options.only in (None, "answers"):
            answers(options.model, options.rows, options.rounds)
        if options.model and options.only in (None, "adapters"):
            for num, rows, siblings in ((2, 16, 8), (2, 32, 8), (3, 16, 8), (3, 32, 8), (2, 16, 1)):
                adapters(options.model, num, rows, siblings, options.rounds)


if __name__ == "__main__":
    main()
