"""The README's numbers are those of their sources, and its Python runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from pages import blocks
from places import ROOT

README = (ROOT / "README.md").read_text()
REAL = ROOT / "docs" / "results" / "real"


def test_the_curve_is_drawn_from_the_grids(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "draw.py"))
    assert {rewards.shape for rewards in drawn["curves"]().values()} == {(10, 6)}
    made, kept = (re.sub(r"<metadata>.*</metadata>", "", path.read_text(), flags=re.DOTALL) for path in (
        drawn["draw"](tmp_path / "curve.svg"), ROOT / "docs" / "images" / "curve.svg"
    ))  # fmt: skip
    lines = re.compile(r'<g id="(?:collm-cc|collm-dc|magrpo)">.*?</g>', re.DOTALL)
    assert lines.findall(made) == lines.findall(kept)
    assert len(lines.findall(kept)) == 3


def test_the_python_of_the_first_screen_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(code, "README.md", "exec"), {})
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"agent_0", "agent_1"}
