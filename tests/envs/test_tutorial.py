"""docs/your-own-environment.md does what it says: its files, its Python and its commands are run as they stand there."""

from __future__ import annotations

import json
import shlex
import sys

import datasets
import pytest
from pages import blocks
from places import ROOT

from collm.cli.main import main
from collm.runs.directory import read_config

PAGE = ROOT / "docs" / "your-own-environment.md"


def test_every_block_of_the_page_is_one_that_is_run():
    kinds = [(block.file, block.language) for block in blocks(PAGE)]
    assert not any(block.why for block in blocks(PAGE))
    assert [kind for kind in kinds if kind[0]] == [
        ("cover.py", "python"),
        ("cover.toml", "toml"),
        ("posts.jsonl", "json"),
        ("keywords.py", "python"),
    ]
    assert {kind for kind in kinds if not kind[0]} == {("", "python"), ("", "console")}
    source = next(block.text for block in blocks(PAGE) if block.file == "cover.py")
    assert source.count("\n") <= 70


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty working directory, from which the page's modules can be imported; they are forgotten afterwards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("cover", "keywords"):
        sys.modules.pop(name, None)


def test_the_tutorial_trains_its_painters(desk, capsys):
    num_commands, shown = 0, []
    for _, name, language, text in blocks(PAGE):
        if name:
            (desk / name).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, "tutorial", "exec"), {})
            shown.append(capsys.readouterr().out)
        else:
            for line in text.splitlines():
                assert line.startswith("$ ")
                if line == "$ export PYTHONPATH=.":
                    continue
                command, *words = shlex.split(line[2:])
                assert command == "collm"
                assert main(words) == 0, line
                num_commands += 1
    capsys.readouterr()
    assert num_commands == 12
    by_hand, _ = shown
    assert "You are painter_2 of 3. Wall 0." in by_hand
    assert "2 of 3 colours were named. Again." in by_hand
    assert read_config(desk / "runs" / "posts").env.options == {"data": str(desk / "posts.jsonl")}

    def held_out(*words: str) -> dict:
        assert main(["evaluate", "runs/cover", "--env.name", "cover:Cover", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    before, after = held_out("--checkpoint", "start"), held_out()
    sampled = held_out("--evaluation.temperature", "1.0")
    print(f"\nheld-out: {before['reward']} -> {after['reward']}, sampled {sampled['reward']}")
    assert before["episodes"] == after["episodes"] == 30
    assert before["reward"]["mean"] <= 0.5
    assert after["reward"]["mean"] >= 0.9
    assert sampled["reward"]["mean"] >= 0.7
    assert after["metrics"]["rejected"]["mean"] == 0
    assert (desk / "runs" / "cover" / "report" / "report.html").is_file()
