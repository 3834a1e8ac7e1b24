"""`collm export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from collm.reports.card import card_of
from collm.runs.examples import of_agent, recorded_examples
from collm.runs.hub import check_complete, check_push, push
from collm.runs.weights import export, load_agent, refuse_existing


def run(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    refuse_existing(target)
    if arguments.push:
        check_push(arguments.push)
    policy, what = load_agent(arguments.run, arguments.agent, arguments.checkpoint, device="cpu")
    if arguments.push:
        check_complete(policy, merged=arguments.merged)
    adapter = policy.adapter is not None and not arguments.merged
    card = card_of(arguments.run, arguments.agent, arguments.checkpoint, adapter=adapter)
    examples = of_agent(recorded_examples(arguments.run), arguments.agent)
    export(policy, target, examples, merged=arguments.merged, card=card)
    record = {"agent": arguments.agent, "weights": what, "folder": str(target)}
    if arguments.push:
        record["address"] = push(target, arguments.push)
    if arguments.json:
        print(json.dumps(record))
    else:
        print(f"{arguments.agent} of {arguments.run} ({what}) is in {target}; transformers loads it without collm.")
        if arguments.push:
            print(f"It was uploaded to {record['address']}")
    return 0
