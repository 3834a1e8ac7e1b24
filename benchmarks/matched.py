"""What the benchmarks share: answers of a fixed length and their reward, stopwatches, separate processes, the reference.

It also runs in the reference's virtual environment, so it does not import collm.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

REFERENCE = ("comlrl==1.3.6", "torch==2.13.0", "pettingzoo==1.27.0")
"""The last one is for this package's environments, which reward the reference."""

Row = dict[str, Any]
Observe = Callable[[int, int, int], str]
"""(task, agent's number, turn) -> the agent's observation."""


def team_reward(answers: Sequence[str], length: int) -> float:
    """Fraction of positions at which all answers have the same letter. Every answer must have exactly `length` letters."""
    for answer in answers:
        if len(answer) != length or not answer.isalpha():
            raise AssertionError(f"an answer of {len(answer)} characters instead of {length} letters: {answer!r}")
    return sum(len(set(letters)) == 1 for letters in zip(*answers)) / length


def make_world(num_agents: int, turns: int, observe: Observe, answer_length: int) -> Any:
    """An environment for collm with the observation `observe(task, agent, turn)` and the reward `team_reward`."""
    from collm.envs.base import Outcome, TextEnv

    class World(TextEnv):
        num_tasks = 4096

        def begin(self, task: int, rng: random.Random) -> dict[str, str]:
            return self.say()

        def play(self, answers: dict[str, str]) -> Outcome:
            asked = not any(answers.values())  # by the trainer, once, for the names of the metrics
            reward = 0.0 if asked else team_reward(list(answers.values()), answer_length)
            return Outcome(reward, {}, self.say(self.turn + 1))

        def say(self, turn: int = 0) -> dict[str, str]:
            return {agent: observe(self.task, i, turn) for i, agent in enumerate(self.agents)}

    return World([f"agent_{i}" for i in range(num_agents)], turns)


def count_turns(groups: Sequence[Any], answer_length: int) -> int:
    """Number of joint actions in groups of collm's episodes; raises if an episode failed or an answer has another length."""
    turns = 0
    for episode in (episode for group in groups for episode in group.episodes):
        if episode.failure:
            raise AssertionError(f"an episode failed: {episode.failure}")
        for turn in episode.turns:
            lengths = [len(completion.token_ids) for completion in turn.completions.values()]
            if set(lengths) != {answer_length}:
                raise AssertionError(f"answers of {lengths} tokens instead of {answer_length}")
        turns += len(episode.turns)
    return turns


class Stopwatch:
    """Wall-clock and CPU seconds spent inside its `with` blocks. settle: called before each reading of the clock."""

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.wall = self.cpu = 0.0
        self.settle = settle

    def __enter__(self) -> None:
        self.settle()
        self.started = time.perf_counter(), time.process_time()

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self.settle()
        self.wall += time.perf_counter() - self.started[0]
        self.cpu += time.process_time() - self.started[1]


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, imports included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << (20 if sys.platform == "darwin" else 10))


def surroundings(threads: int | None = None, *, gpu: bool = False) -> dict[str, str]:
    """Environment variables of a measuring process: quiet, offline, `threads` threads, and no GPU by default."""
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    env |= {"TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if threads is not None:
        env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return env if gpu else env | {"CUDA_VISIBLE_DEVICES": ""}


def in_a_process(command: Sequence[Any], threads: int | None, *, gpu: bool = False) -> Any:
    """Run a measurement in a process of its own, by default on the CPU; returns the JSON value on its last line."""
    done = subprocess.run(command, env=surroundings(threads, gpu=gpu), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(map(str, command))}")
    return json.loads(done.stdout.splitlines()[-1])


def make_reference(folder: Path) -> Path:
    """The Python of the reference's virtual environment, which is made if it is missing or incomplete."""
    wanted = [*REFERENCE, f"transformers=={metadata.version('transformers')}"]
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if not (stamp.exists() and stamp.read_text().split() == wanted and python.exists()):
        print(f"making {folder}: {' '.join(wanted)}", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True, stdout=sys.stderr)
        stamp.write_text("\n".join(wanted))
    return python
