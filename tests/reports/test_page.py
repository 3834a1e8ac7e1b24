"""The report page holds what the run directory holds, loads nothing, and works by keyboard in a real browser."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import DOWN, LEFT, RIGHT, UP, Browser
from test_reports import record, write_run

from collm.reports.page import EPISODES, flat, page_data, pick, write_page
from collm.runs.open import Run, open_run
from collm.settings.load import parse_config
from collm.training.trainer import Trainer

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!-- é 😀"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two iterations of two builders in a persistent world, with a critic."""
    values: dict[str, Any] = {
        "run": {
            "name": "small",
            "folder": str(tmp_path_factory.mktemp("runs")),
            "iterations": 2,
            "threads": 1,
            "trackers": [],
        },
        "env": {
            "name": "str_build",
            "wording": "terse",
            "strings": ["IL", "CM", "LI"],
            "eval_strings": ["MI", "LC"],
            "turns": 2,
            "world": "persistent",
        },
        "rollout": {"tasks": 3, "max_tokens": 24},
        "algorithm": {"name": "collm-cc"},
        "learner": {"lr": 1e-4},
        "evaluation": {"every": 1},
    }
    return open_run(Trainer(parse_config(values), quiet=True).run())


def embedded(path: Path) -> dict[str, Any]:
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_holds_curves_tables_and_episodes(run: Run, tmp_path: Path) -> None:
    [shown] = embedded(write_page([run], tmp_path / "report.html"))["runs"]
    assert [point[0] for point in shown["held_out"]] == [0, 6, 12]
    assert [point[0] for point in shown["training"]] == [6, 12]
    assert list(shown["explained"]) == ["turn 1", "turn 2"]
    assert list(shown["rows"])[:2] == ["reward", "iou"]
    names = [part["name"] for part in shown["sets"]]
    assert names == [
        "held-out, after 2 iterations",
        "held-out, after 0 iterations",
        "training, iteration 2",
        "training, iteration 1",
    ]
    trained = shown["sets"][2]["episodes"][0]["turns"][0]["agents"]["builder_0"]
    assert all(isinstance(trained[key], float) for key in ("value", "td_error", "advantage"))
    assert "Build" in trained["read"]


def test_nothing_is_loaded_from_elsewhere(run: Run, tmp_path: Path) -> None:
    page = write_page([run], tmp_path / "report.html")
    text = page.read_text(encoding="utf-8")
    head, script = text.split('<script id="data"')[0], text.rpartition("<script>")[2]
    loads = r"""(?:src|href)\s*=|url\(|@import|import\s*\(|fetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|\bImage\("""
    assert re.findall(loads, head + script) == ["fetch("]
    assert "fetch(" in script.partition("async function poll() {")[2].partition("\n}\n")[0]
    assert "version" not in embedded(page)  # without it the page never polls
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_hostile_texts_stay_data(tmp_path: Path) -> None:
    folder = write_run(tmp_path / HOSTILE.replace("/", "-"), {0: [record(HOSTILE, 0.0)], 4: [record(HOSTILE, 1.0)]})
    path = write_page([open_run(folder)], tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert embedded(path)["runs"][0]["sets"][0]["episodes"][0]["label"] == HOSTILE


def test_settings_that_differ_are_named(run: Run, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", {0: [record("a", 0.0)], 4: [record("a", 1.0)]})
    data = page_data([run, open_run(other)])
    assert data["settings"]["run.iterations"] == [2, 4]
    assert "run.iterations" in data["differing"]
    assert "run.seed" not in data["differing"]
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}


def test_many_episodes_are_thinned_from_worst_to_best() -> None:
    episodes = [{"task": n, "score": float((7 * n) % 100), "failure": ""} for n in range(100)]
    episodes.append({"task": 100, "score": None, "failure": "the engine was gone"})
    chosen = pick(episodes)
    assert len(chosen) == EPISODES
    assert chosen[0]["failure"]
    assert chosen[-1]["score"] == 99
    assert [e["score"] for e in chosen[1:]] == sorted(e["score"] for e in chosen[1:])
    assert pick(episodes[:3]) == sorted(episodes[:3], key=lambda e: e["score"])


def test_a_browser_steps_through_an_episode_without_an_error(run: Run, tmp_path: Path, browser: Browser) -> None:
    page = write_page([run], tmp_path / "report.html")
    browser.call("/url", {"url": page.as_uri()})
    where, chosen = (
        "document.getElementById('where').textContent",
        "document.querySelector('#list [aria-selected=true]').textContent",
    )
    assert browser.read(where) == "turn 1 of 2"
    first = browser.read(chosen)
    read = browser.read("document.querySelector('.agent pre').textContent")
    browser.press(RIGHT)
    assert browser.read(where) == "turn 2 of 2"
    assert browser.read("document.querySelector('.agent pre').textContent") != read
    browser.press(RIGHT, LEFT, LEFT, LEFT)
    assert browser.read(where) == "turn 1 of 2"
    browser.press(DOWN)
    assert browser.read(chosen) != first
    browser.press(UP)
    assert browser.read(chosen) == first
    assert browser.read("document.querySelectorAll('#turn svg rect').length") == 2 * 5 * 6
    assert browser.read("document.querySelectorAll('#curves svg').length") == 2
    ground = "getComputedStyle(document.body).backgroundColor"
    light = browser.read(ground)
    browser.read("document.getElementById('theme').click()")
    assert browser.read(ground) != light
    assert browser.console() == []
    picture = base64.b64decode(browser.call("/screenshot", method="GET"))
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "page.png").write_bytes(picture)
