"""One run of a study, in a separate process: `python -m collm.training.cell train|evaluate SETTINGS.json FOLDER JUDGED`.

JUDGED is the number of answers whose credit is judged at half of the training: `training.fidelity`.

Both kinds write a run directory; its folder `final` exists once the run is finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import torch

from collm.engines.catalogue import make_engine
from collm.errors import CollmError, RunError
from collm.rollout.collector import LocalCollector
from collm.runs.directory import CODE, begin, lock, read_config
from collm.runs.files import explained
from collm.runs.log import RunLog
from collm.runs.output import complain
from collm.settings.load import parse_resolved
from collm.settings.rooms import Config
from collm.training.assemble import make_team, resolve_device, with_remote
from collm.training.evaluate import evaluate
from collm.training.fidelity import JudgedTrainer
from collm.training.signals import Interrupted
from collm.training.task import check_fit


def main(arguments: Sequence[str]) -> int:
    kind, settings, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    try:
        config = parse_resolved(json.loads(settings.read_text(encoding="utf-8")))
        if kind == "train":
            train(config, folder, int(arguments[3]))
        else:
            play(config, folder)
    except CollmError as error:
        complain(f"collm: {error}")
        return error.exit_code
    except Interrupted as interrupted:
        return 128 + interrupted.signum
    return 0


def train(config: Config, folder: Path, judged: int) -> None:
    """Begin a run, or resume it."""
    if (folder / "config.json").is_file():
        found = read_config(folder)
        code = [[str(attrgetter(setting)(one)) for setting in CODE] for one in (found, config)]
        other = any(":" in recorded and recorded != own for recorded, own in zip(*code, strict=True))
        if other or (found.env.name, found.team.api_key_env) != (config.env.name, config.team.api_key_env):
            raise RunError(
                f"run {str(folder)!r} is of the environment {found.env.name!r} (or of other code or servers), not of the "
                f"recipe's {config.env.name!r}. Give the comparison another --folder."
            )
        present = {  # never what the folder brings along
            "cluster.address": config.cluster.address or "none",
            "run.trackers": config.run.trackers,
        }
        trainer = JudgedTrainer.resume(folder, overrides=present, quiet=True)
    else:
        trainer = JudgedTrainer(config, quiet=True)
    trainer.judged = judged
    trainer.run()


def play(config: Config, folder: Path) -> None:
    """Evaluate the untrained team once and write a run directory without training."""
    config = config.model_copy(update={"run": config.run.model_copy(update={"device": resolve_device(config.run.device)})})
    torch.set_num_threads(config.run.threads or 1)
    team = make_team(config, check_fit(config))
    engine = with_remote(make_engine(team, config.rollout), config)
    result = evaluate(config, LocalCollector(engine, shards=config.rollout.shards))
    if not (folder / "config.json").is_file():
        begin(folder, config)
    with lock(folder), explained(folder / "final"):
        log = RunLog(folder)
        log.episodes(0, result.episodes, suffix="-evaluation")
        log.metrics({"iteration": 0, "joint_actions": 0, "tokens/evaluation": result.tokens, **result.summary()})
        log.flush()
        log.close()
        (folder / "final").mkdir(exist_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
