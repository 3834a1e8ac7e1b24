"""`collm imitate`."""

from __future__ import annotations

import argparse
import json

from collm.errors import ConfigError
from collm.runs.directory import command
from collm.settings.load import load_config


def run(arguments: argparse.Namespace) -> int:
    if arguments.steps < 1:
        raise ConfigError(f"--steps {arguments.steps} learns nothing. Give 1 or more.")
    config = load_config(arguments.recipe, arguments.overrides)
    config.check_trains()
    from collm.training.display import Display

    display = Display(arguments.steps)
    try:
        with display.phase("loading"):
            from collm.training.imitate import imitate
        done = imitate(config, steps=arguments.steps, data=arguments.data, out=arguments.out, display=display)
    finally:
        display.close()
    if arguments.json:
        record = {"folder": str(done.folder), "steps": arguments.steps, "loss": [done.losses[0], done.losses[-1]]}
        print(json.dumps(record | {"reward": done.reward, "models": {a: str(place) for a, place in done.starts.items()}}))
        return 0
    print(
        f"The team is in {done.folder}; loss in nats per token: {done.losses[0]:.3f} at first, {done.losses[-1]:.3f} at last."
    )
    models = [word for agent, place in done.starts.items() for word in (f"--team.models.{agent}", place)]
    print(f"Next: {command('collm', 'train', arguments.recipe, *models)}")
    return 0
