"""A headless Chromium for tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"


class Browser:
    """A headless Chromium behind its own driver: the WebDriver protocol over plain HTTP."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}/session"
        options = {
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--window-size=1200,1600",
            ]
        }
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.call("", {"capabilities": {"alwaysMatch": wanted}}, seconds=180)["sessionId"]

    def call(self, path: str, body: dict[str, Any] | None = None, method: str = "POST", *, seconds: float = 60) -> Any:
        data = None if method in ("GET", "DELETE") else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return json.load(answer)["value"]

    def read(self, script: str) -> Any:
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def press(self, *keys: str) -> None:
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def later(self, script: str, *, seconds: float = 60) -> Any:
        """The value of a promise."""
        self.call("/timeouts", {"script": int(1000 * seconds)})
        return self.call("/execute/async", {"script": f"({script}).then(arguments[0])", "args": []}, seconds=seconds + 10)

    def until(self, script: str, wanted: Any, *, seconds: float = 60) -> None:
        """Wait for the value of an expression."""
        end = time.monotonic() + seconds
        while (found := self.read(script)) != wanted:
            assert time.monotonic() < end, f"{script} is {found!r} and not {wanted!r}"
            time.sleep(0.1)

    def console(self) -> list[Any]:
        """The messages of the browser's console since the last call."""
        return self.call("/se/log", {"type": "browser"})

    def memory(self) -> dict[str, int]:
        """What the page holds after a garbage collection: bytes of the JavaScript heap, documents, DOM nodes and listeners."""
        self._devtools("HeapProfiler.collectGarbage")
        counts = self._devtools("Memory.getDOMCounters")
        return {"heap": self._devtools("Runtime.getHeapUsage")["usedSize"], **counts}

    def _devtools(self, name: str) -> Any:
        return self.call("/goog/cdp/execute", {"cmd": name, "params": {}})


@contextmanager
def opened() -> Iterator[Browser]:
    driver = shutil.which("chromedriver")
    if driver is None or shutil.which("chromium") is None:
        pytest.skip("NO BROWSER: the report page was not opened. Install Debian's chromium and chromium-driver to check it.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/status")
            found = Browser(port)
            yield found
            found.call("", method="DELETE")
        finally:
            process.terminate()


def wait_for(url: str, *, seconds: float = 60) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
            return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)
