"""The live page shows what a run writes while it is open, keeps what is read, holds a bounded memory, and answers this machine
alone."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browsing import DOWN, Browser
from places import ROOT
from processes import line_of
from test_reports import record, write_run

from collm.cli.main import main
from collm.errors import ConfigError, RunError
from collm.reports.live import Live, Server
from collm.reports.page import POINTS, page_data, thin, write_page
from collm.runs.files import write_text
from collm.runs.open import open_run

HOSTILE = "</script><img src=x onerror=alert(1)>\u2028<!-- é 😀"
ALARM = {"alarm/answers_repeated": 0.75}


def episode(label: str, score: float, wrote: str = "an answer", turns: int = 2) -> dict[str, Any]:
    """A recorded episode of one agent."""
    seat = {"read": f"read of {label}", "wrote": wrote, "finish": "stop", "tokens": 3, "learned": ""}
    turn = {"reward": score, "raw_reward": score, "parts": {}, "state": "", "agents": {"solo": seat}}
    return record(label, score, turns=[turn] * turns, terminated=True)


def write_iteration(folder: Path, iteration: int, episodes: list[dict[str, Any]], **metrics: float) -> None:
    """What training writes in one iteration: its episodes, then its line of metrics."""
    write_text(folder / "episodes" / f"{iteration:06d}.jsonl", "".join(json.dumps(e) + "\n" for e in episodes))
    line = {"iteration": iteration, "joint_actions": 10 * iteration, "reward/raw": iteration / 100, **metrics}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def new_run(folder: Path) -> Path:
    """A run of four iterations whose first held-out evaluation has been played."""
    write_run(folder, {0: [episode("held", 0.5)]})
    (folder / "metrics.jsonl").write_text('{"iteration": 0, "joint_actions": 0}\n')
    return folder


def seen(live: Live, since: int = 0) -> dict[str, Any]:
    """What changed, without the rest that follows a look at the files."""
    live._rest_until = 0.0
    return live.changes(since)


# --- what changed ----------------------------------------------------------------------------------------------------


def test_only_the_parts_that_changed_are_sent(tmp_path: Path) -> None:
    folder = new_run(tmp_path / "run")
    live = Live([folder])
    whole = seen(live)
    static = page_data([open_run(folder)])
    assert {**whole["runs"][0], "trouble": ""} == {**static["runs"][0], "trouble": ""}
    assert whole["settings"] == static["settings"]
    assert seen(live, whole["version"]) == {"version": whole["version"], "runs": [{}]}
    write_iteration(folder, 1, [episode("first", 0.25)])
    more = seen(live, whole["version"])
    assert more["version"] > whole["version"]
    assert set(more["runs"][0]) == {"iterations", "cost", "training", "sets", "newest"}
    assert more["runs"][0]["training"] == [[10, 0.01]]
    assert "settings" not in more
    write_iteration(folder, 2, [episode("first", 0.25)], **ALARM)
    last = seen(live, more["version"])["runs"][0]
    assert "alarms" in last
    assert "75%" in last["alarms"][0]
    assert seen(live, 10**15) == seen(live)  # no version of this server


def test_a_run_that_begins_is_resumed_and_is_damaged(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    live = Live([folder])
    before = seen(live)
    assert "has not begun" in before["runs"][0]["trouble"]
    assert before["settings"] == {}
    new_run(folder)
    for iteration in (1, 2):
        write_iteration(folder, iteration, [episode("first", 0.5)])
    begun = seen(live, before["version"])
    assert begun["runs"][0]["trouble"] == ""
    assert begun["runs"][0]["iterations"] == [2, 4]
    assert begun["settings"]["env.name"] == ["made_up"]
    (folder / "episodes" / "000002.jsonl").unlink()  # resumed after iteration 1
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    write_text(folder / "metrics.jsonl", "".join(lines[:2]))
    resumed = seen(live, begun["version"])["runs"][0]
    assert resumed["training"] == [[10, 0.01]]
    assert resumed["sets"][-1]["name"] == "training, iteration 1"
    (folder / "metrics.jsonl").write_text("{}\n")
    damaged = seen(live, begun["version"])["runs"][0]
    assert "is damaged" in damaged["trouble"]
    assert damaged["training"] == [[10, 0.01]]
    with pytest.raises(RunError, match="is damaged"):
        Live([folder])
    shutil.rmtree(folder)
    assert "has not begun" in seen(live)["runs"][0]["trouble"]


def test_an_evaluation_that_failed_whole_is_left_out_of_the_curve(tmp_path: Path) -> None:
    failed = [record("held", None, failure="the server was gone")]
    folder = write_run(tmp_path / "run", {0: [episode("held", 0.5)], 2: failed, 4: [episode("held", 1.0)]})
    live = Live([folder])
    assert [point[:2] for point in seen(live)["runs"][0]["held_out"]] == [[0, 0.5], [40, 1.0]]
    write_text(folder / "episodes" / "000002-evaluation.jsonl", "{}\n")
    with pytest.raises(RunError, match=r"000002-evaluation\.jsonl.* is damaged"):
        Live([folder])


class Troubled(Live):
    error: Exception | None = None

    def _read(self, number: int) -> None:
        super()._read(number)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [OSError("too many open files"), KeyError("a fault")])
def test_a_run_that_could_not_be_read_is_read_again(tmp_path: Path, error: Exception) -> None:
    live = Troubled([new_run(tmp_path / "run")])
    write_iteration(tmp_path / "run", 1, [episode("first", 0.25)])
    live.error = error
    assert repr(error) in seen(live)["runs"][0]["trouble"]
    live.error = None
    assert seen(live)["runs"][0]["trouble"] == ""


class Slow(Live):
    def _read(self, number: int) -> None:
        time.sleep(0.05)
        super()._read(number)


def test_reading_takes_a_tenth_of_the_time_at_most(tmp_path: Path) -> None:
    folder = new_run(tmp_path / "run")
    live = Slow([folder])
    write_iteration(folder, 1, [episode("first", 0.25)])
    began = time.monotonic()
    version = live.changes(0)["version"]
    assert live._rest_until >= began + 0.5
    write_iteration(folder, 2, [episode("first", 0.25)])
    live._rest_until = time.monotonic() + 60
    assert live.changes(0)["version"] == version
    assert seen(live)["version"] > version


def test_a_curve_of_many_points_keeps_its_end() -> None:
    assert thin([1, 2]) == [1, 2]
    points = thin(list(range(10 * POINTS + 3)))
    assert len(points) <= POINTS
    assert points[-1] == 10 * POINTS + 2
    assert len({b - a for a, b in pairwise(points)}) == 1


# --- the server ------------------------------------------------------------------------------------------------------


@contextmanager
def served(*folders: Path) -> Iterator[Server]:
    with Server(Live(folders), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(server: Server, path: str, *hosts: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    """The answer to a request with these Host headers, and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for host in hosts:
        connection.putheader("Host", host)
    connection.endheaders()
    found = connection.getresponse()
    body = found.read()
    connection.close()
    return found, body


def ask(server: Server, path: str, *hosts: str, method: str = "GET") -> tuple[int, bytes]:
    found, body = answer(server, path, *(hosts or [f"127.0.0.1:{server.server_port}"]), method=method)
    return found.status, body


def test_the_server_answers_get_of_its_paths_to_this_machine_alone(tmp_path: Path) -> None:
    with served(new_run(tmp_path / "run")) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert ask(server, "/")[0] == 200
        code, text = ask(server, "/changes?since=0", f"localhost:{server.server_port}")
        assert code == 200
        assert ask(server, f"/changes?since={json.loads(text)['version']}") == (204, b"")
        for path in (
            "/changes",
            "/changes?since=-1",
            "/changes?since=1e3",
            "/config.json",
            "/../config.json",
            "/changes/",
        ):
            assert ask(server, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS"):
            assert ask(server, "/", method=method)[0] == 501
        for hosts in (
            ["evil.example"],
            [f"evil.example:{server.server_port}"],
            ["127.0.0.1.evil.example"],
            [],
            [""],
            ["[::1]"],
            ["127.0.0.1", "evil.example"],
            ["127.0.0.1", "127.0.0.1"],
        ):
            found, text = answer(server, "/changes?since=0", *hosts)
            assert found.status == 421
            assert b"held" not in text


def test_answers_have_the_headers_that_shield_them(tmp_path: Path) -> None:
    with served(new_run(tmp_path / "run")) as server:
        for path in ("/", "/changes?since=0"):
            found, body = answer(server, path, "127.0.0.1")
            assert found.headers["Cache-Control"] == "no-store"
            assert found.headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert found.headers["X-Content-Type-Options"] == "nosniff"
            policy = [part.strip() for part in found.headers["Content-Security-Policy"].split(";")]
            assert policy[0] == "default-src 'none'"
            if path == "/":
                script = re.search(rb"<script>(.*)</script>", body, re.DOTALL)
                assert script is not None
                digest = base64.b64encode(hashlib.sha256(script[1]).digest()).decode()
                assert f"script-src 'sha256-{digest}'" in policy
                assert {"base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "connect-src 'self'"} < {*policy}


def test_a_port_that_is_taken_and_options_that_do_not_fit_are_refused(tmp_path: Path, capsys: Any) -> None:
    folder = new_run(tmp_path / "run")
    with served(folder) as server:
        assert main(["report", str(folder), "--watch", "--port", str(server.server_port)]) == 2
    with pytest.raises(ConfigError, match="cannot be had"):
        Server(Live([folder]), 70_000)
    assert main(["report", str(folder), "--watch", "--json"]) == 2
    assert main(["report", str(folder), "--port", "80"]) == 2
    assert capsys.readouterr().err.count("\n") == 3


@contextmanager
def watching(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """`collm report RUN --watch` as a process of its own, its address, and what it printed before."""
    command = [sys.executable, "-m", "collm.cli.main", "report", str(folder), "--watch"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    }
    with subprocess.Popen(command, **options) as process:
        try:
            lines = []
            while (line := line_of(process)) and not line.startswith("Following"):
                lines.append(line)
            found = re.fullmatch(r"Following .* until Ctrl-C: (http://127\.0\.0\.1:\d+/)\n", line)
            assert found is not None, line
            yield process, found[1], "".join(lines)
        finally:
            process.kill()


def test_ctrl_c_ends_it_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "not-yet"
    with watching(folder) as (process, _, before):
        assert before == f"The run has not begun: {folder} holds no settings yet.\n"
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=30)
        assert out == "The report has stopped.\n"
        assert "Traceback" not in errors
        assert process.returncode == 0


# --- in a browser ----------------------------------------------------------------------------------------------------

CHOSEN = "document.querySelector('#set').selectedOptions[0]?.textContent"
WHERE = "document.getElementById('where').textContent"
WROTE = "document.querySelector('.wrote')?.textContent"
FOLLOWING = "document.getElementById('follow').getAttribute('aria-pressed')"


def test_an_open_page_shows_what_a_run_writes(tmp_path: Path, browser: Browser) -> None:
    folder = tmp_path / "run"
    with served(folder) as server:
        browser.call("/url", {"url": server.url})
        assert "has not begun" in browser.read("document.getElementById('alarms').textContent")
        assert browser.read(WHERE) == "no recorded episodes"
        browser.read("window.opened = 'once'")

        new_run(folder)
        browser.until(CHOSEN, "held-out, after 0 iterations")
        assert browser.read("document.getElementById('alarms').textContent") == ""
        write_iteration(folder, 1, [episode("a task", 0.5, HOSTILE), episode("another", 0.75)])
        browser.until(CHOSEN, "training, iteration 1")
        assert browser.read(WROTE) == HOSTILE
        assert browser.read("document.querySelectorAll('img').length") == 0

        write_iteration(folder, 2, [episode("a task", 0.25, "of two")], **ALARM)
        browser.until(WROTE, "of two")
        browser.until("document.getElementById('alarms').textContent.includes('after iteration 2')", True)
        drawn = "document.querySelector('#curves path').getAttribute('d').match(/[ML]/g).length"
        browser.until(drawn, 2)

        browser.press(DOWN)
        assert browser.read(FOLLOWING) == "false"
        write_iteration(folder, 3, [episode("a task", 0.0, "of three")])
        browser.until(drawn, 3)
        assert browser.read(CHOSEN) == "training, iteration 2"
        assert browser.read(WROTE) == "of two"
        browser.press("f")
        assert browser.read(FOLLOWING) == "true"
        assert browser.read(CHOSEN) == "training, iteration 3"
        assert browser.read(WROTE) == "of three"
        assert browser.read("document.querySelector('#set').options.length") == 4

        assert browser.read("window.opened") == "once"
        assert browser.console() == []
        browser.read("document.body.append(make('script', {}, 'window.ran = true'))")
        assert browser.read("window.ran") is None
        assert "Content Security Policy" in browser.console()[0]["message"]


def test_f_shows_the_newest_before_something_arrives_and_after_a_change_of_run(tmp_path: Path, browser: Browser) -> None:
    folders = [new_run(tmp_path / name) for name in ("a", "b")]
    for folder, last in zip(folders, (3, 2), strict=True):
        for iteration in range(1, last + 1):
            write_iteration(folder, iteration, [episode("a task", 0.5)])
    with served(*folders) as server:
        browser.call("/url", {"url": server.url})
        assert browser.read(CHOSEN) == "training, iteration 3"
        browser.press(DOWN)
        browser.read("(run => { run.value = 1; run.dispatchEvent(new Event('change')); })(document.getElementById('run'))")
        browser.press("f")
        assert browser.read(CHOSEN) == "training, iteration 2"
        write_text(folders[1] / "episodes" / "000002-evaluation.jsonl", json.dumps(episode("held", 1.0)) + "\n")
        browser.until(CHOSEN, "held-out, after 2 iterations")


def test_a_page_that_cannot_go_on_says_so(tmp_path: Path, browser: Browser) -> None:
    with served(new_run(tmp_path / "run")) as server:
        browser.call("/url", {"url": server.url})
        browser.read("redraw = () => { throw new Error('planted'); }")
        write_iteration(tmp_path / "run", 1, [episode("a task", 0.5)])
        browser.until("document.getElementById('live').textContent", "This page stopped: planted")
        assert "planted" in browser.console()[0]["message"]


def test_a_written_page_asks_for_nothing(tmp_path: Path, browser: Browser) -> None:
    page = write_page([open_run(new_run(tmp_path / "run"))], tmp_path / "report.html")
    browser.call("/url", {"url": page.as_uri()})
    assert (
        browser.later("new Promise(done => setTimeout(() => done(performance.getEntriesByType('resource').length), 2500))") == 0
    )
    assert browser.read("document.getElementById('follow').hidden")
    assert browser.console() == []


HOURS = int(os.environ.get("COLLM_HOURS", "6"))
POLLS = HOURS * 3600 // 2
"""Polls of so many hours."""
ARRIVALS = 4 * HOURS
"""Iterations that arrive meanwhile."""


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of memory of a process."""
    return 1024 * int(re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())[1])  # type: ignore[index]


@pytest.mark.slow
def test_hours_of_polling_leave_memory_flat(tmp_path: Path, browser: Browser) -> None:
    """`COLLM_HOURS=24 pytest -m slow tests/reports/test_live.py -s` polls as in a day."""
    folder = new_run(tmp_path / "run")
    with watching(folder) as (process, url, _):
        browser.call("/url", {"url": url})
        began, held = time.monotonic(), {}
        for arrival in range(1, ARRIVALS + 1):
            write_iteration(folder, arrival, [episode(f"task {n}", n / 24, "words " * 200) for n in range(24)])
            browser.later(f"(async () => {{ for (let i = 0; i < {POLLS // ARRIVALS}; i++) await poll(); }})()", seconds=300)
            if arrival in (ARRIVALS // 4, ARRIVALS):
                browser.until("document.querySelector('#set').selectedOptions[0].textContent", f"training, iteration {arrival}")
                held[arrival] = {**browser.memory(), "server": resident(process)}
        first, last = held.values()
        print(f"{POLLS} polls in {time.monotonic() - began:.0f} s: {first} -> {last}")
        assert last["heap"] - first["heap"] < 500_000
        assert last["server"] - first["server"] < 8_000_000
        for name in ("nodes", "documents", "jsEventListeners"):
            assert last[name] <= first[name] * 1.1
        assert browser.console() == []
        process.send_signal(signal.SIGINT)
        browser.until("document.getElementById('live').textContent", "The server does not answer.")
