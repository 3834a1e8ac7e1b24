"""What a grid's runs wrote: `python docs/results/texts.py runs/compare-real_forms docs/results/real/forms` writes texts.json.

For every run directory: the reward of each held-out task after training, and what each agent read and wrote in the first two
held-out episodes before and after it. `table.py` shows them.
"""

import json
import sys
from pathlib import Path
from typing import Any

SHOWN = 2
"""Held-out episodes whose texts are kept."""


def texts_of(run: Path) -> dict[str, Any]:
    """The held-out rewards after training by task, and texts before and after, of a run directory."""
    files = sorted((run / "episodes").glob("*-evaluation.jsonl"))
    before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in (files[0], files[-1]))
    kept = {"before": [_texts(one) for one in before[:SHOWN]], "after": [_texts(one) for one in after[:SHOWN]]}
    scores: dict[str, list[float]] = {}
    for one in after:
        scores.setdefault(str(one["task"]), []).append(one["score"])
    return {"rewards": {task: sum(found) / len(found) for task, found in scores.items()}, **kept}


def _texts(episode: dict[str, Any]) -> dict[str, Any]:
    turns = [{name: [own["read"], own["wrote"]] for name, own in turn["agents"].items()} for turn in episode["turns"]]
    return {"task": episode["label"], "reward": episode["score"], "turns": turns}


if __name__ == "__main__":
    runs, folder = Path(sys.argv[1]), Path(sys.argv[2])
    finished = sorted(path for path in runs.glob("*/*") if (path / "final").is_dir())
    found = {path.name: texts_of(path) for path in finished}
    (folder / "texts.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(found)} runs of {runs}")
