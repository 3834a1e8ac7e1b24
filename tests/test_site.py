"""The pages of README.md and docs/: links lead somewhere, code can be read, and every page is in the site's navigation."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import time
import tomllib
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from pages import PAGES, blocks, run_session, typed
from places import ROOT
from servers import free_port

from collm.cli.main import make_parser, split_overrides
from collm.errors import ConfigError
from collm.settings.load import describe, load_config
from collm.studies.recipe import read_plan

DOCS = ROOT / "docs"
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
GENERATED = {"index.md", "contributing.md", "changelog.md"}
"""Pages that docs/files.py makes from the root's files."""


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.+)$", FENCED.sub(lambda code: code[0].strip("`") if "\n" not in code[0] else "", page.read_text()), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """Links of a page that lead nowhere. Outside links are not followed; they must be https or this machine's."""
    found = []
    for link in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        parts = urlsplit(link)
        if parts.scheme:
            if parts.scheme != "https" or not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)+", parts.netloc):
                found.append(link)
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        known = anchors(target) if target.suffix == ".md" and target.is_file() else set()
        if not target.is_file() or not target.is_relative_to(ROOT) or (parts.fragment and parts.fragment not in known):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_a_heading(page):
    assert broken(page) == []


def test_planted_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path.resolve())
    page, other = tmp_path / "page.md", tmp_path / "other.md"
    other.write_text("# The `one` heading: here\n\n```\n# not a heading\n```\n")
    right = ["other.md", "other.md#the-one-heading-here", "#own", "https://arxiv.org/abs/2601.21972"]
    wrong = ["no.md", "other.md#not-a-heading", "#nowhere", "http://arxiv.org", "https://nowhere", "../page.md", "."]
    page.write_text("# Own\n`[no](link.md)`\n" + "".join(f"[a]({link})\n\n![b]({link})\n" for link in right + wrong))
    assert broken(page) == [link for link in wrong for _ in "ab"]


def test_the_navigation_has_every_page_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(named) == sorted(written | GENERATED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_list_or_table_begins_after_an_empty_line(page):
    """Else the site shows it as part of the paragraph, while other readers of Markdown show a list."""
    lines = FENCED.sub(lambda code: code[0] if "\n" not in code[0] else "", page.read_text(encoding="utf-8")).splitlines()
    item = re.compile(r"\s*(- |\d+\. |\|)")
    inside = [
        line
        for before, line in pairwise(lines)
        if item.match(line) and before and not before.startswith(("#", " ")) and not item.match(before)
    ]
    assert inside == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_of_code_can_be_read(page):
    def lines(text):
        return [json.loads(line) for line in text.splitlines()]

    readers = {"python": ast.parse, "toml": tomllib.loads, "json": lines}
    for block in blocks(page):
        readers.get(block.language, str)(block.text)


def commands() -> list[tuple[str, str]]:
    """(page, command) of each line in a block that calls collm, except where words stand for others (RUN, [NAME], ...)."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            for line in block.text.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("collm ") and not re.search(r"\[|\.\.\.|\b[A-Z]{3,}\b", line.partition("#")[0]):
                    found.append((page.relative_to(ROOT).as_posix(), line))
    return found


def test_every_command_is_one_that_the_parser_takes():
    settings, parser = {name for name, _, _ in describe()}, make_parser()
    for page, line in commands():
        command = re.sub(r"( > \S+)?( 2>&1)?( &)?$", "", line.partition(" #")[0].rstrip())
        words, overrides = split_overrides(shlex.split(command)[1:])
        try:
            known = parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"{page}: {line}")
        assert known.takes_settings or not overrides, (page, line)
        unknown = {name for name in overrides if not name.startswith("env.")} - settings
        assert not unknown, (page, line, unknown)
        for word in words:
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), (page, word)
    assert len(commands()) >= 60


def read_recipes(page: Path, folder: Path) -> list[str]:
    """Read the recipes and studies among a page's blocks as collm does, and return their names."""
    read = []
    for block in blocks(page):
        if block.language == "toml" and (kind := tomllib.loads(block.text).keys() & {"env", "compare"}):
            recipe = folder / (block.file or "block.toml")
            recipe.write_text(block.text)
            read_plan(recipe, folder / "runs") if "compare" in kind else load_config(recipe)
            read.append(recipe.name)
    return read


def test_every_recipe_and_study_has_settings_that_there_are(tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "recipes" / "tiny")
    read = []
    for number, page in enumerate(PAGES):
        (folder := tmp_path / str(number)).mkdir()
        read += read_recipes(page, folder)
    assert len(read) >= 9
    page = tmp_path / "page.md"
    page.write_text('```toml\n[env]\nname = "agree"\n\n[rollout]\nremoved = 1\n```\n')
    with pytest.raises(ConfigError, match=r"rollout\.removed"):
        read_recipes(page, tmp_path)


def run_page(page: Path, folder: Path, *, seconds: float = 1200) -> subprocess.CompletedProcess[str]:
    """Run a page in an empty folder, with free ports in place of 8000 and 8001."""
    session = "\n".join(typed(block) for block in blocks(page) if not block.why)
    for port in ("8000", "8001"):
        session = re.sub(rf"\b{port}\b", str(free_port()), session)
    return run_session(session, folder, seconds=seconds)


@pytest.mark.slow
@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page, tmp_path):
    if page.stem == "cluster":
        pytest.importorskip("ray", reason="ray is not installed here: pip install 'collm[cluster]'")
    done = run_page(page, tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_few_blocks_of_the_tutorials_are_not_run():
    left_out = [(page.stem, block.why) for page in TUTORIALS for block in blocks(page) if block.why]
    assert left_out == [
        ("cluster", "it installs packages"),
        ("cluster", "it needs a cluster"),
        ("first-run", "it installs packages"),
        ("models", "it downloads a model"),
    ]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```sh\ntrue\n```\n", 0),
        ("```sh\nfalse\n```\n\n```sh\ntrue\n```\n", 1),
        ("```python\nassert 1 > 2\n```\n", 1),
        ("<!-- not run: it fails -->\n```sh\nfalse\n```\n", 0),
        ("Save this as `a.txt`:\n\n```json\n1\n```\n\n```sh\ngrep 1 a.txt\n```\n", 0),
        ("```sh\nsleep 9 &\n```\n\n```sh\nkill $(jobs -p)\nwait\n```\n", 0),
    ],
)  # fmt: skip
def test_a_page_stops_at_its_first_failure(tmp_path, text, code):
    page = tmp_path / "page.md"
    page.write_text(text)
    assert run_page(page, tmp_path).returncode == code


def test_a_page_that_takes_too_long_ends_with_all_that_it_started(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```sh\n(sleep 3 && touch late) &\ntouch begun\nsleep 60\n```\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run_page(page, tmp_path, seconds=2)
    assert (tmp_path / "begun").exists()
    time.sleep(2)
    assert not (tmp_path / "late").exists()
