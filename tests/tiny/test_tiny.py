"""The shipped tiny model: it speaks the format, fits its size, and is a poor team-mate."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

from collm import tiny
from collm.engines.local import LocalEngine
from collm.models import loading
from collm.models.team import Team
from collm.rollout.collector import LocalCollector
from collm.settings.load import parse_config
from collm.training.evaluate import Evaluation, evaluate

PINNED = {"model.safetensors": "763447b2f923069a", "tokenizer.json": "a56e97ef373c9c9e"}


def play(temperature: float = 1.0, **options: object) -> Evaluation:
    config = parse_config(
        {
            "env": {"name": "str_build", "wording": "terse", **options},
            "rollout": {"max_tokens": 200},
            "evaluation": {"temperature": temperature},
        }
    )
    team = Team.from_pretrained({"builder_0": "tiny", "builder_1": "tiny"})
    return evaluate(config, LocalCollector(LocalEngine(team)))


def test_it_fits_in_eight_megabytes_and_unties_its_embeddings() -> None:
    assert sum(path.stat().st_size for path in tiny.folder().iterdir()) <= 8e6
    model = Team.from_pretrained({"a": "tiny"}).policies["a"].model
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()


def test_it_builds_unseen_words_without_coordination() -> None:
    """IoU of two untrained builders on held-out words, none of them in its pre-training, lies between 0.2 and 0.5."""
    result = play(strings="english", lengths=[2, 3, 4], turns=1)
    columns = result.columns()
    assert len(result.played) == len({e.label for e in result.played}) > 200
    assert 0.2 <= columns["iou"].mean() <= 0.5
    assert columns["written_by_both"].mean() > 0.05


def test_it_writes_valid_commands_for_words_of_any_length() -> None:
    for words in (["A", "W", "Q"], ["ZA", "KE"], ["VEX", "JIG"], ["QUIZ", "FLUX"]):
        result = play(strings=words, eval_strings=words, turns=1)
        lines = [
            line
            for episode in result.played
            for turn in episode.turns
            for completion in turn.completions.values()
            for line in completion.text.split("\n")
        ]
        rejected = result.columns()["rejected"].sum()
        assert len(lines) > 2 * len(words)
        assert rejected <= 0.1 * len(lines)


def test_the_shipped_model_is_version_1() -> None:
    """Recorded evidence rests on these files: a task that says something else than it did does not change them."""
    digests = {name: hashlib.sha256((tiny.folder() / name).read_bytes()).hexdigest()[:16] for name in PINNED}
    assert digests == PINNED


def test_who_asks_for_tiny_gets_these_files() -> None:
    assert Path(loading.resolve("tiny")) == tiny.folder()


def test_a_wheel_holds_every_file_of_the_package() -> None:
    """What is not Python is installed only where the package data name it."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["collm"]
    package = ROOT / "collm"
    named = {path for pattern in patterns for path in package.glob(pattern)}
    assert set(tiny.folder().iterdir()) <= named
    assert {p for p in package.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")} == named


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed, and programmers' texts need it")
def test_its_recipe_gives_the_same_weights_twice(tmp_path: Path) -> None:
    """A short run of the command that makes it, twice: the same file to the bit."""
    digests = []
    for name in ("one", "two"):
        folder = tmp_path / name
        words = f"-m collm.tiny.workshop.pretrain {folder} --chats 500 --steps 20 --threads 1"
        subprocess.run([sys.executable, *words.split()], check=True, capture_output=True, timeout=1200)
        digests.append(hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "two" / "tokenizer.json").read_bytes()
