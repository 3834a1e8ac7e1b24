"""The share of an iteration that credit assignment takes: regressions, readings and the difference baseline; critics excluded.

    python benchmarks/credit.py recipes/tiny/str_build.toml      # a few minutes on one core

Processor seconds of one thread, means over the iterations after the first. Replays of the environment belong to the play.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from collm.learning import learner
from collm.settings.load import load_config
from collm.training.trainer import Trainer

SIDES = {
    "metrics alone": {"critic.metrics": "global", "algorithm.teammates": "none"},
    "metrics, replays": {"critic.metrics": "global", "algorithm.teammates": "replay"},
    "readings, effects": {"critic.metrics": "readings", "algorithm.teammates": "effects"},
}


def measured(recipe: Path, settings: dict[str, Any], iterations: int) -> tuple[float, float]:
    """Processor seconds per iteration: of credit assignment, and of everything."""
    credit: list[float] = []
    ends: list[float] = []
    assign = learner.assign_values

    def timed(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        assigned = assign(*arguments, **options)
        ends.append(time.process_time())
        credit.append(ends[-1] - began)
        return assigned

    learner.assign_values = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = {"run.folder": folder, "run.iterations": iterations, "run.threads": 1, "run.trackers": []}
            Trainer(load_config(recipe, {**run, "evaluation.every": 0, **settings}), quiet=True).run()
    finally:
        learner.assign_values = assign
    return sum(credit[1:]) / (iterations - 1), (ends[-1] - ends[0]) / (iterations - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--iterations", type=int, default=4)
    options = parser.parse_args()
    for name, settings in SIDES.items():
        credit, whole = measured(options.recipe, settings, options.iterations)
        print(f"{name:<18} credit {credit:.3f} s of {whole:.2f} s per iteration: {credit / whole:.1%}", flush=True)


if __name__ == "__main__":
    main()
