"""The runs of a study as processes."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from collm.errors import RunError
from collm.settings.load import parse_config
from collm.studies.jobs import StudyJob, run_jobs
from collm.studies.result import Cell


class Ended:
    """A process that has ended with exit code 0."""

    def poll(self) -> int:
        return 0

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return 0


def test_a_run_that_ended_elsewhere_may_be_seen_late(tmp_path: Path) -> None:
    job = StudyJob(Cell("two", "magrpo", None, 0, tmp_path / "run"), parse_config({"env": {"name": "agree"}}), trained=True)

    def begin(*_: object) -> Ended:
        threading.Timer(0.3, (tmp_path / "run" / "final").mkdir, kwargs={"parents": True}).start()
        return Ended()

    assert run_jobs([job], 1, begin=lambda *_: Ended(), after_each=lambda: None) == [job]
    assert run_jobs([job], 1, begin=lambda *_: Ended(), patience=0.2, after_each=lambda: None) == [job]
    with pytest.raises(RunError):  # it is seen, and has no results
        run_jobs([job], 1, begin=begin, patience=60, after_each=lambda: None)
