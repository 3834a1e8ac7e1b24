"""A full disk: one clear message, exit code 1, and a run that goes on as if nothing had been."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_resume import collm, finish, outcome, start


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 60 MB; a checkpoint of the test's run takes about 33."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root): the full-disk tests did not run")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fails_cleanly(process: subprocess.Popen[str]) -> None:
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "No space left" in err
    assert "--resume" in err
    assert "Traceback" not in err


def test_a_checkpoint_that_does_not_fit_harms_nothing(tmp_path: Path, small_disk: Path) -> None:
    words = start(tmp_path, "whole", 6)
    assert collm(*words).wait(timeout=300) == 0
    fails_cleanly(collm(*words, "--run.folder", str(small_disk), "--run.name", "part"))
    part = small_disk / "part"
    assert [path.name for path in (part / "checkpoints").iterdir()] == ["000002"]
    moved = Path(shutil.copytree(part, tmp_path / "moved"))  # more room
    finish(moved)
    assert outcome(moved) == outcome(tmp_path / "whole")


def test_a_line_that_does_not_fit_harms_nothing(tmp_path: Path, small_disk: Path) -> None:
    words = start(tmp_path, "whole", 6)
    assert collm(*words).wait(timeout=300) == 0
    (small_disk / "filler").write_bytes(b"x" * (60 * 1024 * 1024 - 48 * 1024))
    fails_cleanly(collm(*words, "--run.folder", str(small_disk), "--run.name", "part"))
    (small_disk / "filler").unlink()
    moved = Path(shutil.copytree(small_disk / "part", tmp_path / "moved"))
    finish(moved)
    assert outcome(moved) == outcome(tmp_path / "whole")
