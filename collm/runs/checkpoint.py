"""Checkpoints: written under another name, flushed to the disk, renamed. A folder whose name is a number is complete.

    checkpoints/000040/
        state.json                  how far the run is
        policy-AGENT.safetensors    float32 weights of each policy, or of its adapter alone
        regression.safetensors      of returns, with critic.metrics or critic.body="none"; regression-AGENT if each has its own
        readings.safetensors        the columns of readings; readings-AGENT if each has its own
        without.safetensors         the difference baseline's regressions, with algorithm.teammates
        effects.safetensors         learned effects of lines, with algorithm.teammates="effects"
        `yardstick.safetensors`     the metric ceiling: what environment metrics explain within tasks, for the report
        critic-NAME.safetensors     critic (of its adapter and head alone, if it is one) or value head, with running moments
        optimizer-NAME.safetensors  AdamW's averages and step counts
        replay-critic-NAME.safetensors  recent iterations, with critic.replay or critic.body="frozen"
        ahead.json                  episodes of the next iteration, with rollout.ahead

Nothing is pickled, and no random state is saved: every random number is a function of the seed and of its purpose.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from collm.errors import RunError
from collm.learning.learner import Learner
from collm.learning.tensors import restore
from collm.models.blueprint import POLICY
from collm.models.team import AnyTeam
from collm.runs import groups
from collm.runs.directory import checkpoints
from collm.runs.examples import of_agent, write_examples
from collm.runs.files import REMOVING, explained, remove, replacing, write_text
from collm.types import Example, Group

FORMAT = 1
SAVE_AFTER, SAVE_SHARE = 60.0, 0.02
"""See `Pace`: seconds, and a fraction of the time."""
KEPT = 2
"""Number of last checkpoints kept, beside the best one by held-out reward."""
STATE, AHEAD = "state.json", "ahead.json"
_DAMAGE = (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, RecursionError, SafetensorError)


class Pace:
    """When a checkpoint is cheap: `SAVE_AFTER` seconds after the last one, or later, when that took at most `SAVE_SHARE` of the
    time since. An interrupted update or a crash then repeats little."""

    def __init__(self) -> None:
        self.saved, self.took = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        return time.monotonic() - self.saved > max(SAVE_AFTER, self.took / SAVE_SHARE)

    @contextmanager
    def measure(self) -> Iterator[None]:
        """The context in which a checkpoint is written."""
        began = time.monotonic()
        yield
        self.saved = time.monotonic()
        self.took = self.saved - began


def save(folder: Path, learner: Learner, state: Mapping[str, Any], ahead: Sequence[Group] | None = None) -> None:
    """Write checkpoint `folder` atomically. If it exists already, only its state is replaced.

    ahead: the groups that were played for the next iteration already.
    Raises SaveError and leaves no files behind then.
    """
    account = json.dumps({"format": FORMAT, **state}, indent=1)
    if folder.exists():
        if (folder / STATE).read_text(encoding="utf-8") != account:
            write_text(folder / STATE, account)
        return
    with replacing(folder) as aside:
        aside.mkdir()
        for name, tensors in learner.tensors().items():
            with failing_as_os_errors():
                save_file(tensors, aside / f"{name}.safetensors")
        if ahead is not None:
            (aside / AHEAD).write_text(json.dumps(groups.plain(ahead)), encoding="utf-8")
        (aside / STATE).write_text(account, encoding="utf-8")


def save_team(folder: Path, team: AnyTeam, examples: Sequence[Example] = ()) -> None:
    """Write the team as Hugging Face folders with each agent's examples, atomically; earlier files are replaced."""
    with replacing(folder) as aside, failing_as_os_errors():
        aside.mkdir()
        team.save(aside)
        for agent in team.agents:
            write_examples(aside / agent, of_agent(examples, agent))


@contextmanager
def failing_as_os_errors() -> Iterator[None]:
    """Convert errors of the Rust libraries safetensors and tokenizers (which raises a bare Exception) into the OSError that
    caused them."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        if isinstance(error, SafetensorError):
            raise OSError(str(error)) from error
        raise


def load(folder: Path, learner: Learner) -> dict[str, Any]:
    """Restore weights, critics and optimizers, and return the state, with the groups played ahead as "ahead". Raises RunError
    where the files cannot be read or do not fit."""
    state, ahead = read_state(folder), folder / AHEAD
    try:
        learner.restore(lambda name: load_file(folder / f"{name}.safetensors"))
        state["ahead"] = groups.read(groups.GROUPS, json.loads(ahead.read_text(encoding="utf-8"))) if ahead.exists() else None
    except _DAMAGE as error:
        raise RunError(
            f"checkpoint {folder} cannot be read: {error}. Remove that folder to continue from the one before it."
        ) from error
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The run's progress: iteration, joint_actions, best, pending. Raises RunError for a damaged file or another format."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        found = state["format"]
        if any(type(state[name]) is not int or state[name] < 0 for name in ("iteration", "joint_actions")):
            raise ValueError("iteration or joint_actions is not a count")
        _ = {} | (state["pending"] or {})
        _ = None if state["best"] is None else (state["best"][0] + 0.0, state["best"][1] + 0)
    except _DAMAGE as error:
        raise RunError(
            f"checkpoint {folder} cannot be read: {STATE} is damaged ({error!r}). Remove that folder to continue from the one "
            "before it."
        ) from error
    if found != FORMAT:
        raise RunError(
            f"checkpoint {folder} has format {found!r}, and this version of collm reads format {FORMAT}. Continue with the "
            "version that wrote it, or train the run anew."
        )
    return state


def load_policies(folder: Path, policies: Mapping[str, Any]) -> None:
    """Restore only the policies, for evaluation and serving. `policies`: name -> Policy."""
    try:
        for name, policy in policies.items():
            restore(policy.trained, load_file(folder / f"{POLICY}{name}.safetensors"))
    except _DAMAGE as error:
        raise RunError(f"checkpoint {folder} cannot be read: {error}.") from error


def prune(run: Path, best: int | None) -> None:
    """Delete all checkpoints except the last `KEPT` and the best one. A folder is renamed before it is deleted."""
    for old in checkpoints(run)[:-KEPT]:
        if best is None or int(old.name) != best:
            doomed = old.with_name(f"{REMOVING}{old.name}")
            remove(doomed)
            with explained(doomed):
                os.rename(old, doomed)
            remove(doomed)
