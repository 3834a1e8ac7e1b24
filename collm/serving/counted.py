"""Counts and records completion requests: metrics in Prometheus's text format, and a file of JSON lines."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collm.errors import SaveError
from collm.runs.files import append
from collm.runs.output import complain
from collm.types import Completion

PATH = "/v1/chat/completions"
CLIENT_LEFT = 499
"""Status of a request whose client left before its answer was complete, as in nginx."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Bounds of the histogram of answering times."""


@dataclass(slots=True)
class Noted:
    """What is known of a request so far."""

    began: float
    """Seconds since 1970."""
    ended: float = 0.0
    """Likewise; 0 while it is being answered."""
    status: int = CLIENT_LEFT
    messages: int = 0
    prompt_tokens: int = 0
    tokens: int = 0

    def count(self, completion: Completion) -> None:
        self.prompt_tokens, self.tokens = (
            0 if ids is None else len(ids) for ids in (completion.prompt_ids, completion.token_ids)
        )


class Metrics:
    """Numbers of one agent's completion requests, for Prometheus."""

    def __init__(self, agent: str):
        self.agent, self.registry = agent, CollectorRegistry()
        by, registry = ["agent"], self.registry
        self.requests = Counter("collm_requests", "Requests by HTTP status.", [*by, "status"], registry=registry)
        self.prompt_tokens = Counter("collm_prompt_tokens", "Tokens read.", by, registry=registry).labels(agent)
        self.tokens = Counter("collm_completion_tokens", "Tokens sampled.", by, registry=registry).labels(agent)
        self.in_flight = Gauge("collm_requests_in_flight", "Requests in progress.", by, registry=registry).labels(agent)
        seconds = "Time from a request to the end of its answer."
        self.seconds = Histogram("collm_request_seconds", seconds, by, registry=registry, buckets=SECONDS).labels(agent)

    def add(self, noted: Noted) -> None:
        """Add a request that has ended; the histogram takes the times of those with status 200."""
        self.requests.labels(self.agent, str(noted.status)).inc()
        self.prompt_tokens.inc(noted.prompt_tokens)
        self.tokens.inc(noted.tokens)
        if noted.status == 200:
            self.seconds.observe(max(0.0, noted.ended - noted.began))

    def text(self) -> bytes:
        """All numbers in Prometheus's text format."""
        return generate_latest(self.registry)


class Counted:
    """Notes every completion request: in the metrics, and in the file `record` if there is one.

    A request is noted before the last bytes of its answer are sent, so that a client with an answer finds it there. The
    application writes what it knows of it to `scope["noted"]`.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, record: Path | None = None):
        self.app, self.metrics, self.record = app, metrics, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if (scope["type"], scope.get("method"), path) != ("http", "POST", PATH):
            await self.app(scope, receive, send)
            return
        noted = scope["noted"] = Noted(began=time.time())

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                noted.status = message["status"]
            elif not message.get("more_body", False):
                self._end(noted)
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, sending)
            except Exception:
                noted.status = 500
                raise
            finally:
                if not noted.ended and noted.status == 200:
                    noted.status = CLIENT_LEFT
                self._end(noted)

    def _end(self, noted: Noted) -> None:
        """Note a request, once."""
        if noted.ended:
            return
        noted.ended = time.time()
        self.metrics.add(noted)
        if self.record is None:
            return
        line = {name: getattr(noted, name) for name in ("began", "ended", "status", "messages", "tokens")}
        try:
            append(self.record, json.dumps(line) + "\n")
        except SaveError as error:  # the answer is sent in any case
            complain(f"collm: {error}")
