"""docs/your-own-environment.md does what it says: its files, its Python and its commands are run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys

import datasets
import pytest
from places import ROOT

from collm.cli.main import main
from collm.runs.directory import read_config

PAGE = ROOT / "docs" / "your-own-environment.md"
BLOCK = re.compile(r"(?:Save this as `(\S+)`:\n\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[str, str, str]]:
    """(file to save it as or "", language, text) of every code block of the page."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_every_block_of_the_page_is_one_that_is_run():
    kinds = [(name, language) for name, language, _ in blocks()]
    assert PAGE.read_text(encoding="utf-8").count("```") == 2 * len(kinds)
    assert [kind for kind in kinds if kind[0]] == [
        ("cover.py", "python"),
        ("cover.toml", "toml"),
        ("posts.jsonl", "json"),
        ("keywords.py", "python"),
    ]
    assert {kind for kind in kinds if not kind[0]} == {("", "python"), ("", "console")}
    source = next(text for name, _, text in blocks() if name == "cover.py")
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
    for name, language, text in blocks():
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
