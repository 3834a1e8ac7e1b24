"""Ray nodes of a cluster of one's own, and the command that trains on it, for tests in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from processes import kill_all, line_of

OWN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_worker_niceness": "0"}
"""Environment of such a cluster, and of its driver. Without the last, Ray's processes hardly run beside other tests."""


def command(folder: Path, *more: str) -> list[str]:
    """`collm train` on a small task for four iterations, a critic model among them, with these further words."""
    settings = {
        "env.name": "agree", "env.turns": "1", "env.wording": "terse", "rollout.tasks": "8", "rollout.max_tokens": "3",
        "run.iterations": "4", "run.checkpoint_every": "1", "run.threads": "1", "run.device": "cpu", "evaluation.every": "0",
        "run.folder": str(folder), "run.trackers": "[]", "algorithm.name": "collm-cc",
        "critic.body": "auto",
    }  # fmt: skip
    recipe = folder / "recipe.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text('[env]\nname = "agree"\nwording = "terse"\n')
    overrides = [word for name, value in settings.items() if name != "env.name" for word in (f"--{name}", value)]
    return [sys.executable, "-m", "collm.cli.main", "train", str(recipe), *overrides, *more]


@contextmanager
def node(*options: str, environment: dict[str, str], host: str = "") -> Iterator[subprocess.Popen]:
    """A node of a cluster of one's own, on this machine, once it runs.

    environment: has `OWN`. host: the network namespace that it is in.
    """
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--object-store-memory=200000000"]
    words += ["--disable-usage-stats", *options]
    words = ["ip", "netns", "exec", host, *words] if host else words
    begun = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        said = []
        while "Ray runtime started" not in (line := line_of(begun)):
            said.append(line)
            assert line, "".join(said)
        yield begun
    finally:
        kill_all(begun)
