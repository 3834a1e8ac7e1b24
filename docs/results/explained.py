"""Writes explained.json beside a grid's results: `python docs/results/explained.py runs/compare-NAME docs/results/...`.

Of each run with a critic: for every iteration, the fraction of the variance of returns that each critic explains before the
last turn, differences between tasks included. results.json has one number per turn; this shows how it varies. Runs that are not
in the first folder keep what is written of them.
"""

import json
import re
import sys
from pathlib import Path

from collm.runs.open import open_run

NAME = re.compile(r".*critic/explained_variance_turn_(\d+)")


def by_iteration(folder: Path) -> list[list[float | None]]:
    """For every iteration, the fraction that each critic explains before the last turn."""
    records = open_run(folder).metrics
    last = max((int(found[1]) for record in records for name in record if (found := NAME.fullmatch(name))), default=None)
    shares = [
        [value for name, value in record.items() if (f := NAME.fullmatch(name)) and int(f[1]) == last] for record in records
    ]
    return [[None if share is None else round(share, 4) for share in row] for row in shares if row]


def main(runs: Path, folder: Path) -> None:
    written = folder / "explained.json"
    kept = json.loads(written.read_text()) if written.exists() else {}
    found = {path.parent.name: by_iteration(path.parent) for path in runs.glob("*/*/final")}
    kept |= {name: rows for name, rows in found.items() if rows}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(kept[name])}" for name in sorted(kept))
    written.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
