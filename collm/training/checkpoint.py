"""Checkpoints: written aside, flushed to the disk, renamed. A folder with a plain number is whole or does not exist.

    checkpoints/000040/
        state.json                  how far the run is
        policy-AGENT.safetensors    float32 weights of each policy, or of its adapter alone
        regression.safetensors      of returns on the world's numbers, with critic.metrics
        without.safetensors         of surprises on what team-mates changed, with critic.difference
        yardstick.safetensors       of the same, within tasks, for the report
        critic-NAME.safetensors     critic (of its adapter and head alone, if it is one) or value head, with running moments
        optimizer-NAME.safetensors  AdamW's averages and step counts

There is no pickle and no random state: every random number is a function of the seed and of what it is for.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collm.errors import RunError, SaveError
from collm.learning.learner import Learner
from collm.learning.tensors import restore
from collm.models.team import Team

FORMAT = 1


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn a failure to write into a SaveError that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SaveError(
            f"cannot write {path}: {reason}. Nothing saved before is damaged: make room (or mend permissions) and "
            "continue with `collm train --resume RUN`."
        ) from error


def save(folder: Path, learner: Learner, state: Mapping[str, Any]) -> None:
    """Write checkpoint `folder` atomically; of one that exists already only the state is replaced. Raises SaveError, leaving
    no trace."""
    account = json.dumps({"format": FORMAT, **state}, indent=1)
    if folder.exists():
        if (folder / "state.json").read_text(encoding="utf-8") != account:
            write_text(folder / "state.json", account)
        return
    aside = folder.with_name(f".saving-{folder.name}")
    try:
        with explained(folder):
            _remove(aside)
            aside.mkdir(parents=True)
            for name, tensors in learner.tensors().items():
                save_file(tensors, aside / f"{name}.safetensors")
            (aside / "state.json").write_text(account, encoding="utf-8")
            for path in aside.iterdir():
                _flush(path)
            _flush(aside)
            os.rename(aside, folder)
            _flush(folder.parent)
    except BaseException:
        _remove(aside)
        raise


def save_team(folder: Path, team: Team) -> None:
    """Write the team's ordinary Hugging Face folders, all or nothing; what lay there before is replaced."""
    aside = folder.with_name(f".saving-{folder.name}")
    try:
        with explained(folder):
            _remove(aside)
            team.save(aside)
            _remove(folder)
            os.rename(aside, folder)
    except BaseException:
        _remove(aside)
        raise


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restore weights, critics and optimizers, and return the state. Raises RunError where they do not fit."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        learner.restore(lambda name: load_file(folder / f"{name}.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(
            f"checkpoint {folder} cannot be read: {error}. Remove that folder to continue from the one before it."
        ) from error
    return state


def load_policies(folder: Path, policies: Mapping[str, Any]) -> None:
    """Restore policies alone, as evaluation and serving need. `policies`: name -> Policy."""
    try:
        for name, policy in policies.items():
            restore(policy.trained, load_file(folder / f"policy-{name}.safetensors"))
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise RunError(f"checkpoint {folder} cannot be read: {error}.") from error


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of `RUN/checkpoints`, or None."""
    found = sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit()) if folder.is_dir() else []
    return found[-1] if found else None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best one. A folder is renamed before it is emptied."""
    for old in sorted(path for path in folder.glob("[0-9]*") if path.name.isdigit())[:-keep]:
        if best is None or int(old.name) != best:
            doomed = old.with_name(f".removing-{old.name}")
            os.rename(old, doomed)
            _remove(doomed)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or removal left behind."""
    for path in folder.glob(".*"):
        if path.name.startswith((".saving-", ".removing-")):
            _remove(path)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    with explained(path):
        aside = path.with_name(f".saving-{path.name}")
        aside.write_text(text, encoding="utf-8")
        _flush(aside)
        os.replace(aside, path)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
