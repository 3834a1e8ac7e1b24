"""`collm train`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from collm.cli.main import settings_text
from collm.errors import ConfigError, PartLost
from collm.runs.directory import RESUMABLE, check_named, checkpoints, command, read_settings
from collm.runs.output import complain
from collm.settings.load import load_config

NAMED_AGAIN = (("env", "name"), ("team", "api_key_env"), ("algorithm", "baseline"), ("critic", "metrics"))
"""(room, setting) that a resumed run may have to name again, since it came with the run's folder."""


def demo_recipe() -> Path:
    """The recipe of `collm train` without a recipe."""
    return Path(str(resources.files("collm.cli") / "demo.toml"))


def announce(what: str, team: Mapping[str, Any]) -> None:
    """Print a line before torch and the models are loaded, which takes seconds. team: the settings of the room `team`."""
    sources = dict.fromkeys([team.get("model") or "tiny", *(team.get("models") or {}).values()])
    rank = f", adapters of rank {team['lora'].get('rank')}" if team.get("lora") else ""
    complain(f"{what}: loading {', '.join(map(str, sources))}{rank}")


def run(arguments: argparse.Namespace) -> int:
    if arguments.settings:
        print(settings_text())
        return 0
    overrides: dict[str, Any] = {}
    if arguments.resume is not None:
        if arguments.recipe is not None:
            raise ConfigError(
                "--resume continues a run with the settings it began with; leave out the recipe, or start a new run with "
                "another --run.name."
            )
        overrides = dict(arguments.overrides)
        again = {f"{room}.{key}" for room, key in NAMED_AGAIN}
        if all(name in again or name.startswith(RESUMABLE) for name in overrides):  # other overrides are refused below
            values = read_settings(arguments.resume)
            check_named(arguments.resume, values, overrides, training=True)
            for room, key in NAMED_AGAIN:  # the run's own value is not a change
                table = values.get(room)
                if isinstance(table, dict) and table.get(key) == overrides.get(f"{room}.{key}"):
                    overrides.pop(f"{room}.{key}", None)
            announce(f"resuming {arguments.resume}", values.get("team", {}))
        from collm.training.trainer import Trainer

        trainer = Trainer.resume(arguments.resume, overrides=overrides)
    else:
        if arguments.recipe is None and arguments.overrides.get("env.name", "str_build") != "str_build":
            raise ConfigError(
                f"env.name={arguments.overrides['env.name']!r} does not fit the built-in demonstration, whose other settings "
                "(env.strings among them) are for str_build. Write a recipe: a TOML file that begins with [env] and name = ..."
            )
        config = load_config(arguments.recipe or demo_recipe(), arguments.overrides)
        config.check_trains()
        announce(f"{config.run_name}: {config.env.name}, {config.algorithm.name}", config.resolved()["team"])
        from collm.training.trainer import Trainer

        trainer = Trainer(config)
    from collm.training.signals import Interrupted

    restarts, lost = trainer.config.cluster.restarts, False
    try:
        while True:
            try:
                if lost:
                    trainer = Trainer.resume(trainer.folder, overrides=overrides)
                folder = trainer.run()
                break
            except PartLost as error:
                trainer.engine.close()
                trainer.signals.check()  # a signal to all processes also ends seats
                if not restarts:
                    raise
                complain(f"collm: {error} Restarting ({restarts} left).")
                restarts, lost = restarts - 1, True
    except Interrupted as interrupted:
        kept = checkpoints(trainer.folder)
        saved, begun = int(kept[-1].name) if kept else 0, trainer.iteration + (not trainer.whole)
        which = f"Iterations {saved + 1} to {begun} were" if begun > saved + 1 else f"Iteration {begun} was"
        repeated = f"{which} not saved and will be repeated. " if begun > saved else ""
        complain(
            f"collm: {interrupted}; saved after {saved} iterations. {repeated}"
            f"Continue with: {command('collm', 'train', '--resume', trainer.folder)}"
        )
        return 128 + interrupted.signum
    finally:
        trainer.engine.close()
    if arguments.json:
        from collm.runs.read import read_metrics

        print(json.dumps({"run": str(folder), **read_metrics(folder / "metrics.jsonl")[-1]}))
    else:
        print(f"The trained team is in {folder}/final. Next: {command('collm', 'report', folder)}")
    return 0
