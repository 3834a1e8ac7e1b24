"""HumanEval solutions with their tests that the sandbox judges per second, from the warm pool.

    python benchmarks/sandbox.py --data HumanEval.jsonl.gz
    python benchmarks/sandbox.py --data HumanEval.jsonl.gz --workers 1 --rounds 5 --json

One unit is one problem: its prompt and reference solution as the program, its whole test as the one check. The cache is
off. `cold_s` is the time until a new pool has passed its self-test; `warm_ms` is the median time of one trivial check on its
own; `per_second` is the median over the rounds, each of which judges every problem of the file once.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
from pathlib import Path

from collm.sandbox import Job, Sandbox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HumanEval.jsonl or HumanEval.jsonl.gz, in its public format")
    parser.add_argument("--workers", type=int, default=2, help="boxes at work at the same time")
    parser.add_argument("--rounds", type=int, default=5, help="number of times every problem is judged")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    jobs = _jobs(options.data)
    start = time.perf_counter()
    with Sandbox(options.workers, cache=0) as sandbox:
        cold = time.perf_counter() - start
        trivial = [_seconds(sandbox, [Job(f"x = {i}", (f"assert x == {i}",))]) for i in range(100)]
        rounds = [_seconds(sandbox, jobs) for _ in range(options.rounds)]
    result = {
        "workers": options.workers,
        "problems": len(jobs),
        "cold_s": round(cold, 3),
        "warm_ms": round(1000 * statistics.median(trivial), 2),
        "per_second": round(len(jobs) / statistics.median(rounds), 1),
        "per_second_worst_round": round(len(jobs) / max(rounds), 1),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24}{value}")


def _jobs(path: Path) -> list[Job]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [Job(r["prompt"] + r["canonical_solution"], (f"{r['test']}\ncheck({r['entry_point']})",)) for r in rows]


def _seconds(sandbox: Sandbox, jobs: list[Job]) -> float:
    start = time.perf_counter()
    verdicts = sandbox.judge(jobs)
    seconds = time.perf_counter() - start
    failed = [v for job in verdicts for v in job if not v.passed]
    if failed:
        raise SystemExit(f"{len(failed)} right solutions failed, the first with {failed[0].error!r}: the timing is not valid.")
    return seconds


if __name__ == "__main__":
    main()
