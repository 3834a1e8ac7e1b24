"""Every kind of process of a run on a cluster, killed at random moments: the run ends as one that nothing happened to."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time

import pytest
from processes import below
from ray_nodes import command
from test_seats import check_same

pytest.importorskip("ray", reason="ray is not installed, so nothing was tried on it: pip install 'collm[cluster]'")

KILLS = int(os.environ.get("COLLM_KILLS", "4"))
KINDS = ("seat", "rollout worker", "node", "driver", "head")
HELD = {"seat": "ray::Seat", "rollout worker": "ray::Player", "node": "/raylet/raylet", "head": "/gcs_server"}
"""Kind of process -> what its command line holds. Of the seats, those of an agent and of the critic, any may be hit."""
LONGEST = max(900.0, 120.0 * KILLS)
"""Seconds."""


def alive(kind: str, driver: int) -> list[int]:
    return [driver] if kind == "driver" else [pid for pid, line in below(driver).items() if HELD[kind] in line]


@pytest.mark.slow
def test_killed_at_random_moments_the_run_ends_equal(tmp_path):
    """`COLLM_KILLS=20 pytest tests/cluster/test_kills_apart.py -m slow -s` kills twenty; losing the head takes a minute.

    With and without an iteration ahead by chance, or as COLLM_AHEAD says.
    """
    dice = random.Random(os.urandom(8))
    ahead = os.environ.get("COLLM_AHEAD") or dice.choice("01")
    settings = ("--rollout.shards", "3", "--run.iterations", str(10 * KILLS), "--rollout.ahead", ahead)
    settings += ("--algorithm.loss", "ppo_clip")
    subprocess.run(command(tmp_path, "--run.name", "whole", *settings), check=True, capture_output=True)
    placed = ("--cluster.address", "local", "--cluster.rollouts", "2", "--cluster.restarts", "100")
    begin = command(tmp_path, "--run.name", "apart", *settings, *placed)
    resume = [*begin[:3], "train", "--resume", str(tmp_path / "apart"), *placed]
    metrics, killed = tmp_path / "apart" / "metrics.jsonl", []
    end = time.monotonic() + LONGEST
    resumed = seen = 0
    while True:
        with (tmp_path / "said").open("a") as said:
            words = resume if (tmp_path / "apart" / "config.json").is_file() else begin
            run = subprocess.Popen(words, stdout=said, stderr=said)
        while run.poll() is None:
            assert time.monotonic() < end, (killed, (tmp_path / "said").read_text())
            time.sleep(dice.uniform(0.2, 2))
            written = metrics.stat().st_mtime_ns if metrics.is_file() else 0
            if len(killed) < KILLS and written > seen:  # the run has gone on since the last kill
                kind = KINDS[len(killed) % len(KINDS)]
                if (there := alive(kind, run.pid)) and run.poll() is None:
                    os.kill(dice.choice(there), signal.SIGKILL)
                    killed.append(kind)
                    seen = metrics.stat().st_mtime_ns
                    print(f"{len(killed)}/{KILLS} {kind}", flush=True)
        if run.returncode == 0:
            break
        assert run.returncode in (1, 2, -signal.SIGKILL), (tmp_path / "said").read_text()  # 2: it was killed as it started
        resumed += 1
    print(f"rollout.ahead={ahead}, killed {killed}; resumed {resumed} times")
    assert len(killed) == KILLS
    said = (tmp_path / "said").read_text()
    assert "was lost" in said
    assert "Restarting (" in said
    check_same(tmp_path / "whole", tmp_path / "apart")
