"""The report page of runs that may still be in training, served to browsers of this machine (`collm report RUN --watch`).

The page asks `/changes?since=VERSION` every two seconds and gets the parts of its data that changed after that version. Parts
are sent whole: files of episodes are replaced whole, and a resumed run drops records that it will write again.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from collm.errors import ConfigError, RunError
from collm.reports.curves import COLOURS, run_names
from collm.reports.page import page_text, plain, run_data, settings_data
from collm.runs.directory import CONFIG, read_settings
from collm.runs.open import Run
from collm.runs.read import Record
from collm.types import encodable

HOST = "127.0.0.1"
NOT_BEGUN = {"run": {"iterations": 0}, "env": {"name": ""}, "algorithm": {"name": ""}}
"""What the page needs of the settings of a run that has not written them."""
SHARE = 0.1
"""Greatest fraction of the time that is spent on reading the runs anew, since they may be training on the same cores."""
IDLE_SECONDS = 30
"""A connection without a request for this long is closed."""
NO_FRAMES = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
Parts = dict[str, tuple[int, Any]]
"""Name of a part of the page's data -> (version at which it changed last, value)."""


class Live:
    """The page's data of runs that have not begun, are in training, or have ended. Threads may share it.

    Versions are milliseconds since 1970, so that a page that outlives its server gets all parts from the next one.
    """

    def __init__(self, folders: Sequence[Path]):
        """Read the runs. Raises RunError where one of them is damaged."""
        self.folders = list(folders)
        self.names = run_names([Run(folder, NOT_BEGUN) for folder in folders])
        self.version = 0
        self._runs: list[Parts] = [{} for _ in folders]
        self._configs: list[Record] = [{} for _ in folders]
        self._page: Parts = {}
        self._stamps: list[Any] = [None for _ in folders]
        self._rest_until = 0.0
        self._lock = threading.Lock()
        for number in range(len(folders)):
            self._read(number)

    def changes(self, since: int) -> Record:
        """The present version, and the parts of the page's data that changed after version `since`; all if it is not one of
        this server's or of one before it."""
        with self._lock:
            if time.monotonic() >= self._rest_until:
                self._look()
            since = since if since <= self.version else 0
            runs = [_after(parts, since) for parts in self._runs]
            return {"version": self.version, "runs": runs, **_after(self._page, since)}

    def _look(self) -> None:
        """Read the runs whose files have changed. A run that cannot be read keeps its data, has the reason as `trouble`,
        and is read again at the next look."""
        began = time.monotonic()
        for number, folder in enumerate(self.folders):
            if _stamp(folder) != self._stamps[number]:
                try:
                    self._read(number)
                except Exception as error:
                    self._stamps[number] = None
                    trouble = str(error) if isinstance(error, RunError) else f"{folder} cannot be shown: {error!r}"
                    self._keep(self._runs[number], {"trouble": trouble})
        ended = time.monotonic()
        self._rest_until = ended + (ended - began) * (1 / SHARE - 1)

    def _read(self, number: int) -> None:
        folder = self.folders[number]
        self._stamps[number] = _stamp(folder)
        run, trouble = opened(folder)
        shown = run_data(self.names[number], run, COLOURS[number % len(COLOURS)])
        self._keep(self._runs[number], {**shown, "trouble": trouble})
        self._configs[number] = {} if run.config is NOT_BEGUN else run.config
        self._keep(self._page, settings_data(self._configs))

    def _keep(self, parts: Parts, values: Record) -> None:
        """Keep the values that are new or differ, under a new version."""
        changed = {name: value for name, value in values.items() if name not in parts or parts[name][1] != value}
        if changed:
            self.version = max(self.version + 1, time.time_ns() // 1_000_000)
            parts |= {name: (self.version, value) for name, value in changed.items()}


def opened(folder: Path) -> tuple[Run, str]:
    """The run in a folder, and the reason where it has not begun. Raises RunError where it is damaged."""
    begun = os.path.lexists(folder / CONFIG) or (os.path.lexists(folder) and not folder.is_dir())
    run = Run(folder, read_settings(folder) if begun else NOT_BEGUN)
    if begun and os.path.lexists(folder / "metrics.jsonl"):
        return run, ""
    run.metrics = []
    return run, f"The run has not begun: {folder} holds no {'metrics' if begun else 'settings'} yet."


def _after(parts: Parts, since: int) -> Record:
    return {name: value for name, (at, value) in parts.items() if at > since}


def _stamp(folder: Path) -> Any:
    """What differs when one of the files that the page is made of has been written, replaced or removed."""
    found: list[Any] = []
    for path in (folder / CONFIG, folder / "metrics.jsonl", folder / "episodes"):
        try:
            state = path.stat()
            found += [state.st_ino, state.st_mtime_ns, state.st_size]
            found += [sorted(os.listdir(path))] if path.name == "episodes" else []
        except OSError:
            found += [None]
    return found


class Server(ThreadingHTTPServer):
    """Serves a `Live` on the loopback address: `/` is the page, `/changes?since=VERSION` what changed after it, as JSON."""

    daemon_threads = True
    allow_reuse_port = False

    def __init__(self, live: Live, port: int):
        """port: 0 for any free one. Raises ConfigError where it cannot be had."""
        self.live = live
        try:
            super().__init__((HOST, port), _Answer)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"--port {port} cannot be had: {reason}. Choose another, or 0 for any free one.") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def server_bind(self) -> None:
        """The base class would also look up the name of the host."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print a traceback, unless the browser has closed its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Answer(BaseHTTPRequestHandler):
    """Answers GET of the known paths on one connection.

    The header Host must name this machine's loopback address, so that a web page whose server's name is made to resolve to it
    (DNS rebinding) cannot read the run.
    """

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "collm", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        host = self.headers.get_all("Host", [])
        if [name.removesuffix(f":{self.server.server_port}") for name in host] not in (["127.0.0.1"], ["localhost"]):
            self._reply(421, "text/plain", f"This server answers at {self.server.url} alone.\n")
        elif path == "/":
            page = page_text(self.server.live.changes(0))
            self._reply(
                200, "text/html", page, f"default-src 'none'; connect-src 'self'; img-src 'self'; {_inline(page)}; {NO_FRAMES}"
            )
        elif path == "/changes" and (since := re.fullmatch("since=([0-9]{1,15})", query)):
            changes = self.server.live.changes(int(since[1]))
            if changes["version"] == int(since[1]):
                self._reply(204)
            else:
                self._reply(200, "application/json", plain(changes))
        elif path == "/favicon.ico":
            self._reply(204)
        else:
            self._reply(404, "text/plain", "Known paths: / and /changes?since=VERSION\n")

    def _reply(self, code: int, kind: str = "", text: str = "", policy: str = "default-src 'none'") -> None:
        body = encodable(text).encode()
        self.send_response(code)
        if code != 204:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def _inline(page: str) -> str:
    """The part of a content security policy that allows the page's one script, by its hash, and its styles."""
    script = page[page.rindex("<script>") + len("<script>") : page.rindex("</script>")]
    digest = base64.b64encode(hashlib.sha256(encodable(script).encode()).digest()).decode()
    return f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
