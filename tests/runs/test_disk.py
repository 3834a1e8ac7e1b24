"""A full disk: one clear message, exit code 1, and a run that goes on as if nothing had been.

COLLM_CAMPAIGN=20 fills the disk at 20 levels for each variant of a run (default 5, over the variants in turn).
"""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kills import CAMPAIGN, RECIPE, VARIANTS, forked, leftovers
from test_resume import collm, finish, outcome, start


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of 60 MB (or the size that a test asks for); a checkpoint of the test's run takes about 33."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = getattr(request, "param", "60m")
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
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


@pytest.mark.slow
@pytest.mark.parametrize("small_disk", ["400m"], indirect=True)
def test_a_disk_that_fills_at_any_level_harms_nothing(
    tmp_path: Path, small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the levels leave room for some share of the run, half for 4 KB, 8 KB, ... (its small files)."""
    levels = min(CAMPAIGN, 20)
    variants = list(VARIANTS) if CAMPAIGN > 5 else [list(VARIANTS)[1]]
    stopped: Counter[str] = Counter()
    for variant in variants:
        recipe = tmp_path / f"{variant}.toml"
        recipe.write_text(RECIPE.format(**VARIANTS[variant]))
        start = ["train", str(recipe), "--run.folder", str(small_disk), "--run.name"]
        whole, run = small_disk / "whole", small_disk / "part"
        assert forked([*start, "whole"]) == 0
        expected = outcome(whole)
        needed = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        shutil.rmtree(whole)
        for level in range(levels):
            share = needed * (level // 2 + 0.5) / ((levels + 1) // 2)
            room = int(share) if level % 2 == 0 else 4096 << (level // 2)
            fill(small_disk, room)
            capfd.readouterr()
            status = forked([*start, run.name])
            said = capfd.readouterr().err
            if status:
                assert status >> 8 == 1, said
                assert "No space left" in said.strip().split("\n")[-1], said
                assert "Traceback" not in said
                stopped[variant] += 1
            assert not leftovers(run), (variant, room)
            (small_disk / "filler").unlink()
            begun = (run / "config.json").is_file()
            assert forked(["train", "--resume", str(run)] if begun else [*start, run.name]) == 0, (variant, room)
            assert outcome(run) == expected, (variant, room)
            shutil.rmtree(run)
    print(f"{dict(stopped)} of {levels} levels each stopped the run; every one went on and ended equal")
    assert sum(stopped.values()) >= levels * len(variants) * 3 // 5


def fill(disk: Path, room: int) -> None:
    """Leave `room` bytes free on a file system."""
    with (disk / "filler").open("wb") as file:
        left = shutil.disk_usage(disk).free - room
        while left > 0:
            left -= file.write(b"x" * min(left, 1 << 20))
