"""`collm export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from collm.runs.examples import of_agent, recorded_examples
from collm.runs.weights import export, load_agent, refuse_existing


def run(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    refuse_existing(target)
    policy, what = load_agent(arguments.run, arguments.agent, arguments.checkpoint, device="cpu")
    export(policy, target, of_agent(recorded_examples(arguments.run), arguments.agent), merged=arguments.merged)
    record = {"agent": arguments.agent, "weights": what, "folder": str(target)}
    if arguments.json:
        print(json.dumps(record))
    else:
        print(f"{arguments.agent} of {arguments.run} ({what}) is in {target}; transformers loads it without collm.")
    return 0
