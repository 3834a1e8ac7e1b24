"""`collm serve` processes for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from places import ROOT
from processes import line_of

from collm.engines.local import LocalEngine
from collm.rollout.collector import LocalCollector
from collm.runs.directory import run_config
from collm.runs.weights import load_team
from collm.training.evaluate import evaluate
from collm.types import Episode


@dataclass
class Server:
    """A `collm serve` process. record: where it writes when each request began and ended; errors: what it complains of."""

    url: str
    process: subprocess.Popen[str]
    record: Path
    errors: Path

    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []


def start(run: Path, agent: str, errors: Path, *words: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "collm.cli.main", "serve", str(run), "--agent", agent, "--threads", "1", *words]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with errors.open("w") as log:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})},
        )


def address(process: subprocess.Popen[str]) -> str:
    """Where a server says that it answers."""
    line = line_of(process)
    assert "answers at http://127.0.0.1:" in line, line
    return line.split()[-1]


@contextmanager
def served(folder: Path, run: Path, *agents: str, words: tuple[str, ...] = (), **options) -> Iterator[list[Server]]:
    records = [folder / f"{agent}-{time.monotonic_ns()}.jsonl" for agent in agents]
    errors = [record.with_suffix(".err") for record in records]
    processes = [
        start(run, agent, log, "--port", "0", "--record", str(record), *words, **options)
        for agent, record, log in zip(agents, records, errors, strict=True)
    ]
    try:
        yield [Server(address(p), p, *files) for p, *files in zip(processes, records, errors, strict=True)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def greedy(run: Path) -> list[Episode]:
    """The run's held-out episodes, in process."""
    config = run_config(run, {})
    return evaluate(config, LocalCollector(LocalEngine(load_team(config, run / "final")))).episodes


def spoken(episode: Episode) -> list:
    return [
        {agent: (c.text, c.prompt_ids.tolist(), c.token_ids.tolist()) for agent, c in turn.completions.items()}
        for turn in episode.turns
    ]


def played(*words: str, timeout: float = 120) -> tuple[int, str, str]:
    """`collm play` in a process of its own, where importing torch is an error: exit code, output, errors."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        assert name.split('.')[0] not in ('torch', 'transformers', 'tokenizers', 'safetensors'), name\n"
        "sys.meta_path.insert(0, Block())\n"
        "from collm.cli.main import main\n"
        "sys.exit(main(['play', *sys.argv[1:]]))\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr
