"""The evidence about a run's credit: answers with their advantages and their counterfactual truth, in `fidelity.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from collm.errors import RunError
from collm.runs.directory import damage, read_file
from collm.runs.files import write_text

FIDELITY = "fidelity.json"


@dataclass(frozen=True)
class Judged:
    """One answer. Example: Judged(episode=3, turn=0, agent="agent_1", advantage=0.2, differences_K=(0.5, 0.0))"""

    episode: int
    turn: int
    agent: str
    advantage: float
    """The advantage that the algorithm gives it, after normalization."""
    differences_K: tuple[float, ...]
    """(K,) `Truth.differences_K`, in units of return."""


@dataclass(frozen=True)
class Evidence:
    """Answers of one state of a team. Example: Evidence(iteration=30, judged=(Judged(...),), mismatches=0, failed=0)"""

    iteration: int
    """Iterations done before."""
    judged: tuple[Judged, ...]
    mismatches: int
    """Answers left out since the replay of their episode differed from the record."""
    failed: int
    """Answers left out since one of their plays failed."""


_EVIDENCE = TypeAdapter(Evidence)


def write_evidence(folder: Path, evidence: Evidence) -> None:
    """Write `fidelity.json` into a run directory. Raises SaveError."""
    write_text(folder / FIDELITY, json.dumps(asdict(evidence), allow_nan=False) + "\n")


def read_evidence(folder: Path) -> Evidence | None:
    """The evidence in a run directory, or None. Raises RunError where the file is damaged."""
    path = folder / FIDELITY
    if not path.is_file():
        return None
    try:
        return _EVIDENCE.validate_json(read_file(path))
    except ValidationError as error:
        raise RunError(f"{str(path)!r} cannot be read: {damage(error)}. Remove it, or train the run anew.") from error
