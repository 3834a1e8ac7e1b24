"""`collm export`, and the one agent of a run that it and `collm serve` load."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from collm.cli.evaluate import find_weights, load_team, run_config
from collm.errors import ConfigError, RunError
from collm.runs.files import replacing

if TYPE_CHECKING:
    from collm.models.policy import Policy


def run(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    if os.path.lexists(target):
        raise RunError(f"{str(target)!r} exists already; name a folder that does not.")
    policy, what = load_agent(arguments.run, arguments.agent, arguments.checkpoint, device="cpu")
    write(policy, target, merged=arguments.merged)
    record = {"agent": arguments.agent, "weights": what, "folder": str(target)}
    if arguments.json:
        print(json.dumps(record))
    else:
        print(f"{arguments.agent} of {arguments.run} ({what}) lies in {target}; transformers loads it without collm.")
    return 0


def write(policy: Policy, target: Path, *, merged: bool = False) -> None:
    """An ordinary Hugging Face folder, all or nothing: a whole model, or an adapter in PEFT's manner, which names its base.

    merged: a whole model in any case, an adapter being added into its base. Raises SaveError.
    """
    from collm.runs.checkpoint import failing_as_os_errors

    with replacing(target) as aside, failing_as_os_errors():
        aside.mkdir()
        if merged and policy.adapter is not None:
            merge(policy, aside)
        else:
            policy.save(aside)


def merge(policy: Policy, folder: Path) -> None:
    """Write an adapter and its base as one whole float32 model."""
    import torch
    from peft import AutoPeftModelForCausalLM

    from collm.models.policy import spell_as_before

    apart = folder / ".adapter"
    policy.save(apart)
    model = AutoPeftModelForCausalLM.from_pretrained(apart, dtype=torch.float32, trust_remote_code=False).merge_and_unload()
    shutil.rmtree(apart)
    model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    spell_as_before(folder)


def load_agent(source: Path, agent: str, checkpoint: str, *, device: str = "") -> tuple[Policy, str]:
    """One agent of a run directory, or the model of an exported folder, and what to call its weights.

    device: instead of the run's own. Raises RunError or ConfigError.
    """
    if not source.is_dir():
        raise RunError(f"there is no run directory or exported folder {str(source)!r}.")
    if (source / "tokenizer_config.json").is_file():
        from collm.models.policy import Policy
        from collm.training.assemble import resolve_device

        if checkpoint != "final":
            raise ConfigError(
                f"--checkpoint {checkpoint} is for run directories; {str(source)!r} holds one model. Leave it out."
            )
        return Policy.from_pretrained(str(source), device=resolve_device(device or "auto")), "exported weights"
    config = run_config(source, {"run.device": device} if device else {}, playing=False)
    weights, what = find_weights(source, checkpoint)
    return load_team(config, weights, only=agent).policies[agent], what
