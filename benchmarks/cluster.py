"""What training in several processes costs and gains on one machine: seats and rollout workers against fewer processes.

    python benchmarks/cluster.py apart      # one process against a seat for each model: CPU seconds, wall time, driver
    python benchmarks/cluster.py rollouts   # one rollout worker against two, with the same shards: wall time
    python benchmarks/cluster.py ahead      # a rollout worker that plays while seats learn against one that waits: wall time
    python benchmarks/cluster.py apart --one-core --repeats 5 --out FILE.json
    python benchmarks/cluster.py apart --iterations 4 -- --team.model build/smollm2   # settings of every side

Each side is `collm train RECIPE` in a process group of its own, with one thread a process. Sides take turns, and ratios are
those of one repeat; their median is printed. Loading of models, the start of Ray and the first iterations (--skip) are left
out: counting begins when the metrics of the last skipped iteration are written, and ends with those of the last iteration.

CPU seconds are those of all processes: the driver, seats and workers, and Ray's own. Wall times need idle cores: two for
`apart` with two agents, one for each rollout worker, and for `ahead` those of the seats as well. Busy cores slow each other
down (memory, and threads of one core), so a side of `apart` is the same run twice at once, whose CPU seconds are the mean of
both. With --one-core all processes of a side share one core.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from collm.envs.agree import Agree
from collm.envs.base import Outcome

TICK = os.sysconf("SC_CLK_TCK")
COLLM = (sys.executable, "-m", "collm.cli.main")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
QUIET = ("--run.trackers", "[]", "--run.threads", "1", "--evaluation.every", "0")

STR_BUILD = ("recipes/tiny/str_build.toml",)
CLIPPED = (
    *(*STR_BUILD, "--algorithm.name", "magrpo", "--algorithm.loss", "ppo_clip"),
    *("--cluster.address", "local", "--cluster.rollouts", "1"),
)
JUDGED = (
    *("recipes/tiny/agree.toml", "--env.name", "cluster:Judged", "--env.turns", "2", "--algorithm.name", "magrpo"),
    *("--rollout.tasks", "16", "--rollout.shards", "4"),
)
"""Collecting bounds it, since the judge computes; shards of 16 episodes, four tasks with four joint actions each."""
JUDGE = 0.03
"""CPU seconds of the judge for a joint action, as a compiler, a simulator or a judging model takes them."""


class Judged(Agree):
    """`agree` with a judge that computes for JUDGE seconds."""

    def play(self, answers: dict[str, str]) -> Outcome:
        end = time.thread_time() + JUDGE
        while time.thread_time() < end:
            pass
        return super().play(answers)


TWICE = "one process, twice at once"
SIDES: dict[str, dict[str, tuple[str, ...]]] = {
    "apart": {
        "one process": STR_BUILD,
        TWICE: STR_BUILD,
        "seats": (*STR_BUILD, "--cluster.address", "local"),
    },
    "rollouts": {
        "one worker": (*JUDGED, "--cluster.address", "local", "--cluster.rollouts", "1"),
        "two workers": (*JUDGED, "--cluster.address", "local", "--cluster.rollouts", "2"),
    },
    "ahead": {"in turn": CLIPPED, "ahead": (*CLIPPED, "--rollout.ahead", "1")},
}


@dataclass(frozen=True)
class Spent:
    """Seconds since a process began: of the clock, and of the CPU by kind of process."""

    wall: float
    driver: float
    seats: float
    ray: float

    @property
    def cpu(self) -> float:
        return self.driver + self.seats + self.ray

    def since(self, before: Spent) -> Spent:
        return Spent(*(now - then for now, then in zip(asdict(self).values(), asdict(before).values(), strict=True)))


def mean(found: Sequence[Spent]) -> Spent:
    """Of each number."""
    return Spent(*(statistics.fmean(values) for values in zip(*(asdict(one).values() for one in found), strict=True)))


def cpu_seconds(driver: int) -> dict[str, float]:
    """CPU seconds of a process and all below it, with ended children that were waited for, by kind of process."""
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    names: dict[int, str] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:
            continue  # it has ended
        parents[int(path.name)] = int(fields[1])
        seconds[int(path.name)] = sum(map(int, fields[11:15])) / TICK
    found = {driver}
    while more := {pid for pid, above in parents.items() if above in found} - found:
        found |= more
    spent = {"driver": 0.0, "seats": 0.0, "ray": 0.0}
    for pid in found & seconds.keys():
        ours = names[pid].startswith("ray::") and "IDLE" not in names[pid]
        # What a sandbox ran is a child of the process that plays the environment, wherever it is.
        kind = "driver" if pid == driver else "seats" if ours else "ray"
        spent[kind] += seconds[pid]
    return spent


def measure(words: tuple[str, ...], iterations: int, skip: int) -> Spent:
    """Train, and return what the iterations after the skipped ones took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*COLLM, "train", *words, *QUIET, "--run.iterations", str(iterations)]
        command += ["--run.folder", folder, "--run.name", "run"]
        begun = time.monotonic()
        with Path(folder, "errors").open("w") as errors:
            process = subprocess.Popen(command, stdout=errors, stderr=errors, process_group=0, env=ENVIRONMENT)
        try:
            metrics, seen = Path(folder, "run", "metrics.jsonl"), []
            for lines in (skip, iterations):
                while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
                    if process.poll() is not None:
                        raise SystemExit(Path(folder, "errors").read_text())
                    time.sleep(0.02)
                seen.append(Spent(time.monotonic() - begun, **cpu_seconds(process.pid)))
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return seen[1].since(seen[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=sorted(SIDES))
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--skip", type=int, default=2, help="first iterations that are not counted")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one-core", action="store_true", help="all processes on one core")
    parser.add_argument("--out", type=Path)
    own, dashes, settings = sys.argv[1:], "--", list[str]()
    if dashes in own:
        own, settings = own[: own.index(dashes)], own[own.index(dashes) + 1 :]
    options = parser.parse_args(own)
    if not 1 <= options.skip < options.iterations:
        parser.error("--skip must be at least 1 and less than --iterations")
    if options.one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sides = SIDES[options.what]
    base, *more, other = sides
    found: dict[str, list[Spent]] = {name: [] for name in sides}
    for repeat in range(1, options.repeats + 1):
        for name, words in sides.items():
            with ThreadPoolExecutor() as pool:
                copies = [
                    pool.submit(measure, (*words, *settings), options.iterations, options.skip)
                    for _ in range(1 + (name == TWICE))
                ]
            spent = mean([copy.result() for copy in copies])
            found[name].append(spent)
            parts = f"driver {spent.driver:.1f}, seats and workers {spent.seats:.1f}, Ray's own {spent.ray:.1f}"
            print(
                f"{repeat}/{options.repeats}  {name:27}  wall {spent.wall:6.1f} s  CPU {spent.cpu:6.1f} s: {parts}", flush=True
            )
    pairs = list(zip(found[base], found[other], strict=True))
    ratios = {
        f"wall, {other} / {base}": [after.wall / before.wall for before, after in pairs],
        f"CPU, {other} / {base}": [after.cpu / before.cpu for before, after in pairs],
        f"driver's part of the CPU seconds, {other}": [after.driver / after.cpu for _, after in pairs],
    }
    for name in more:
        beside = zip(found[name], found[other], strict=True)
        ratios[f"CPU, {other} / {name}"] = [after.cpu / before.cpu for before, after in beside]
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} (from {min(values):.3f} to {max(values):.3f})")
    if options.out:
        spent_by = {name: [asdict(one) for one in all_] for name, all_ in found.items()}
        options.out.write_text(
            json.dumps(
                {"cores": len(os.sched_getaffinity(0)), "settings": settings, "seconds": spent_by, "ratios": ratios},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
