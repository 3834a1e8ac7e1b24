"""The README's numbers are those of their sources, and its Python runs."""

from __future__ import annotations

import json
import math
import re
import runpy
from pathlib import Path

import huggingface_hub
import pytest
from pages import blocks
from places import ROOT
from safetensors import safe_open

from collm.envs.catalogue import make
from collm.models.sources import TINY
from collm.planning.apart import apart
from collm.planning.memory import GIB, plan
from collm.settings.load import load_config

README = (ROOT / "README.md").read_text()
REAL = ROOT / "docs" / "results" / "real"


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B"])
def test_memory_is_what_the_plan_says(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine without the model, whose tokenizer would be used
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    def planned(**more: object) -> tuple[float, float]:
        """GiB on one device, and on the widest device with one unit on each."""
        overrides = {"team.model": f"Qwen/Qwen3-{size}", "run.device": "cuda", **more}
        config = load_config(ROOT / "recipes" / "paper" / "str_build" / "collm-cc-paper.toml", overrides)
        whole = plan(config)
        return whole.peak / GIB, max(found.peak for found in apart(config, whole.work)) / GIB

    (one, widest), (adapters, _) = planned(), planned(**{"team.lora.rank": 16})
    assert f"| {size} | {one:.1f} | {widest:.1f} | {adapters:.1f} |" in README


def test_the_curve_is_drawn_from_the_grids(tmp_path: Path) -> None:
    drawn = runpy.run_path(str(ROOT / "docs" / "images" / "draw.py"))
    assert {rewards.shape for rewards in drawn["curves"]().values()} == {(10, 6)}
    made, kept = (re.sub(r"<metadata>.*</metadata>", "", path.read_text(), flags=re.DOTALL) for path in (
        drawn["draw"](tmp_path / "curve.svg"), ROOT / "docs" / "images" / "curve.svg"
    ))  # fmt: skip
    lines = re.compile(r'<g id="(?:collm-cc|collm-dc|magrpo)">.*?</g>', re.DOTALL)
    assert lines.findall(made) == lines.findall(kept)
    assert len(lines.findall(kept)) == 3


def test_texts_are_those_of_the_run() -> None:
    run = json.loads((REAL / "quote" / "texts.json").read_text())["collm-cc-seed3"]
    for when in ("before", "after"):
        (episode,) = (e for e in run[when] if e["task"] == "1")
        (turn,) = episode["turns"]
        said = "<br>".join(f"{writer}: {answer.strip()}" for writer, (_, answer) in turn.items())
        assert f"— {said} | {episode['reward']:.2f} |" in README
        assert turn["first"][0].split("\n")[0] in README


def test_means_are_those_of_the_grid() -> None:
    methods = json.loads((REAL / "quote" / "results.json").read_text())["tasks"]["quote"]["methods"]
    before, after = (methods[name]["reward"]["mean"] for name in ("parallel", "collm-cc"))
    assert f"five seeds is {before:.3f} before and {after:.3f} after" in README
    hour = json.loads((REAL / "first-hour.json").read_text())
    assert 10.5 < hour["wall_seconds"] / 60 < 11.5
    assert "eleven minutes" in README
    assert "(11 minutes on one core)" in README


def test_counts_are_those_of_the_recipes_and_files() -> None:
    quote = load_config(ROOT / "recipes" / "real" / "quote.toml")
    per_run = quote.run.iterations * quote.rollout.tasks * quote.algorithm.group_size
    assert f"for {per_run:,} joint actions" in README
    results = json.loads((REAL / "quote" / "results.json").read_text())["tasks"]["quote"]["methods"]
    assert f"**after {results['collm-cc']['joint_actions']:.0f} joint actions**" in README
    held_out = make(quote.env.name, split="eval", **quote.env.options).num_tasks
    assert f"one of {held_out} held-out texts" in README
    demo = load_config(ROOT / "collm" / "cli" / "demo.toml")
    words = make(demo.env.name, split="eval", **demo.env.options).num_tasks
    counts = f"{demo.run.iterations} iterations of {demo.rollout.tasks} joint actions; {words} words are held out"
    assert f"One run has {counts}." in README
    with safe_open(TINY / "model.safetensors", "np") as weights:
        size = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    assert f"Two agents of {size / 1e6:.1f} million parameters" in README
    (lines,) = re.findall(r"trains a team in (\d+) lines", README)
    assert len((ROOT / "examples" / "minimal.py").read_text().splitlines()) <= int(lines)


def test_numbers_beside_comlrl_are_those_of_the_benchmark() -> None:
    sides = json.loads((REAL / "comlrl.json").read_text())["sides"]
    rates = [f"{sides[side]['joint_actions_per_cpu_second']:.2f}" for side in ("collm", "comlrl")]
    assert "{} joint actions per CPU second instead of {}".format(*rates) in README
    times = sides["collm"]["joint_actions_per_cpu_second"] / sides["comlrl"]["joint_actions_per_cpu_second"]
    assert f"{times:.1f} times as many joint actions per CPU second as comlrl" in README
    rewards = [sides[side]["after"]["reward"] for side in ("collm", "comlrl")]
    shown = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**reward) for reward in rewards]
    before = sides["collm"]["before"]["reward"]["mean"]
    assert f"{shown[0]} and {shown[1]}, from {before:.3f}" in README


def test_the_demonstration_is_a_run_of_it() -> None:
    report = json.loads((ROOT / "docs" / "images" / "demo.json").read_text())
    for name, (before, after) in report.items():
        cells = ["{mean:.2f} [{low:.2f}, {high:.2f}]".format(**found) for found in (before, after)]
        assert re.search(rf"^\| {name}[^|]* \| {re.escape(cells[0])} \| {re.escape(cells[1])} \|$", README, re.MULTILINE), name


def test_the_python_of_the_first_screen_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block.text for block in blocks(ROOT / "README.md") if block.language == "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    exec(compile(code, "README.md", "exec"), {})
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {"agent_0", "agent_1"}
