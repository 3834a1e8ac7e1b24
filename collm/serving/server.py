"""The server: FastAPI routes around the batcher, and a process that stops cleanly on a signal."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch

from collm.engines.local import LocalEngine
from collm.errors import ConfigError
from collm.models.policy import Policy
from collm.models.team import Team
from collm.runs.examples import recorded_examples, with_examples
from collm.runs.weights import load_agent
from collm.serving import wire
from collm.serving.answers import Form
from collm.serving.batcher import Batcher
from collm.serving.follow import Follower, Piece, ended, tokens_of
from collm.serving.wire import Refused
from collm.types import Example

try:
    import h11
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Receive, Scope, Send
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from collm.serving.counted import PATH, Counted, Metrics, Noted
except ImportError as _error:
    raise ConfigError("`collm serve` needs fastapi, uvicorn and prometheus-client: pip install 'collm[serve]'.") from _error

LARGEST_BODY = 1 << 22
"""Greatest size of a request's body in bytes."""
BODY_SECONDS = 30.0
"""Seconds that a client may take to send the body."""
BACKLOG = 1024
"""Greatest number of connections that wait to be accepted."""
LOCAL = re.compile(r"(127(\.\d{1,3}){3}|localhost|\[::1\])(:\d{1,5})?", re.ASCII | re.IGNORECASE)
"""Host headers that name this machine."""
HEAD_SECONDS = 10.0
"""Seconds that a client may take to send a request's head; the connection is closed after that."""
HALF_OPEN = 512
"""Greatest number of connections without a complete request head; beyond it the oldest is closed."""
PLACES = f"there is nothing here; ask for POST {PATH}, or GET /v1/models, /v1/models/NAME, /health or /metrics"
"""Refusal of other paths and methods."""
GRACE = 60
"""Seconds that running requests have to finish after a signal to stop."""


def load_app(run: Path, agent: str, *, checkpoint: str, device: str, threads: int, **options: Any) -> tuple[FastAPI, str]:
    """(application, description of the weights) of an agent of a run directory, or of an exported folder.

    threads: CPU threads of this process. options: those of `make_app`. Raises RunError or ConfigError.
    """
    torch.set_num_threads(threads)
    policy, what = load_agent(run, agent, checkpoint, device=device)
    return make_app(policy, agent, examples=recorded_examples(run), **options), what


def make_app(
    policy: Policy,
    agent: str,
    *,
    key: str = "",
    max_tokens: int = 256,
    record: Path | None = None,
    local: bool = False,
    examples: Sequence[Example] = (),
) -> FastAPI:
    """The application that serves one agent.

    Args:
        key: the required API key; none if empty.
        max_tokens: default length of an answer.
        record: append one JSON line per completion request: begin and end (seconds since 1970), HTTP status, messages read,
            tokens written.
        local: refuse Host headers that do not name this machine, as protection against web pages that use DNS rebinding.
        examples: put in front of a request's messages, unless these begin with them already.
    """
    engine = LocalEngine(Team({agent: policy}))
    batcher = Batcher(engine, policy)
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    model = {
        "id": agent,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "collm",
        "max_model_len": policy.max_positions,
    }
    metrics = Metrics(agent)

    def read(ids: list[int]) -> str:
        return policy.chat.read(ids)[0]

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        yield
        await batcher.stop()

    app = FastAPI(title=f"collm: {agent}", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)

    def admit(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("utf-8", "replace")
        if key and not hmac.compare_digest(given, f"Bearer {key}".encode()):
            reason = "the API key is missing or wrong; send the header authorization: Bearer KEY"
            raise Refused(401, reason, code="invalid_api_key")

    async def streamed(asked: wire.Asked, form: Form, noted: Noted) -> AsyncIterator[bytes]:
        """The events of an answer. Raises Refused before the first one; a later failure is an event."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()
        follower = Follower(asked, read, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        answer = loop.create_task(batcher.answer(asked.request, follower))
        answer.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            piece = await pieces.get()
            if piece is None:
                answer.result()
            yield form.first()
            while piece is not None:
                yield form.piece(piece)
                piece = await pieces.get()
            try:
                completion = ended(answer.result(), asked.stop)
            except Refused as refused:
                noted.status = refused.status
                yield form.failed(refused)
                return
            noted.count(completion)
            yield form.piece(follower.piece(completion.text)) + form.last(completion)
        finally:
            answer.cancel()
            noted.tokens = noted.tokens or len(follower.tokens)

    app.add_middleware(Counted, metrics=metrics, record=record)
    if local:
        app.add_middleware(LocalHosts)

    @cache
    def spell(token: int) -> str:
        return str(policy.tokenizer.decode([token]))

    @app.get("/health")
    async def health() -> Response:
        return reply(wire.dumps({"status": "ok", "agent": agent}))

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        admit(request)
        return reply(wire.dumps({"object": "list", "data": [model]}))

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        admit(request)
        if name != agent:
            raise wire.unknown_model(name, agent)
        return reply(wire.dumps(model))

    @app.get("/metrics")
    async def numbers(request: Request) -> Response:
        admit(request)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.post(PATH)
    async def completions(request: Request) -> Response:
        noted: Noted = request.scope["noted"]
        await asyncio.sleep(0)  # if the request was malformed, uvicorn has answered and closed the connection by now
        admit(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # web pages of other origins cannot send this type without permission
            reason = f"content-type={kind!r} is not read here; send application/json"
            raise Refused(415, reason, param="content-type", code="unsupported_media_type")
        asked = wire.parse(await read_body(request), agent, max_tokens=max_tokens, vocabulary=vocabulary)
        noted.messages = len(asked.request.messages)
        messages = with_examples(examples, agent, asked.request.messages)
        asked = replace(asked, request=replace(asked.request, messages=messages))
        form = Form(asked, spell)
        if asked.stream:
            events = streamed(asked, form, noted)
            first = await anext(events)  # raises what is refused before a stream begins
            return StreamingResponse(chained(first, events), media_type="text/event-stream")
        follower = Follower(asked, read) if asked.stop or asked.top else None
        completion = ended(await batcher.answer(asked.request, follower), asked.stop)
        noted.count(completion)
        tokens = tokens_of(completion) if follower is None else follower.tokens
        return reply(await asyncio.to_thread(form.whole, completion, tokens))

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return refusal(Refused(error.status_code, PLACES, code="not_found"))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return refusal(Refused(500, "an error of the server's; its log has the reason", code="server_error"))

    return app


async def chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for event in rest:
        yield event


def reply(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, "application/json")


def refusal(error: Refused) -> Response:
    headers = {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(error.status)
    return reply(error.body(), error.status, headers)


class LocalHosts:
    """Answers only requests whose Host header is a name of this machine, with any port."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hosts = [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]
        if scope["type"] == "http" and not (len(hosts) == 1 and LOCAL.fullmatch(hosts[0])):
            reason = "this server answers only to the names 127.0.0.1, localhost and [::1]; for others start it with an API key"
            await refusal(Refused(403, reason, code="forbidden_host"))(scope, receive, send)
            return
        await self.app(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """The body, up to a size and within a time. Raises Refused."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST_BODY:
                    raise Refused(413, f"the body is larger than {LARGEST_BODY >> 20} MiB; send less text", code="too_large")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {BODY_SECONDS:g} s; send it at once", code="timeout") from None
    except ClientDisconnect:
        raise Refused(400, "the client left", code="disconnected") from None
    return bytes(body)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    return bool(LOCAL.fullmatch(host)) or host == "::1"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError where the port is taken or the host is not an address of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host!r} is not an address: {error}. Leave it out for 127.0.0.1.") from error
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
        held.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        held.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"--port {port} on {host} cannot be had: {reason}. Choose another, or 0 for any free one.") from error
    return held


class Guarded(H11Protocol):
    """Uvicorn's protocol with a limit on connections that do not send a complete request head.

    Such a connection is closed after HEAD_SECONDS, or once HALF_OPEN newer ones wait, so that a client that only opens
    connections cannot block others. The number of waiting requests is limited by the batcher.
    """

    waiting: ClassVar[dict[Guarded, asyncio.TimerHandle]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Called after new data. The head of a request is incomplete while its sender's state is IDLE."""
        if self.conn.their_state is not h11.IDLE or self.transport.is_closing():
            self._unwatch()
        elif self not in self.waiting:
            if len(self.waiting) >= HALF_OPEN:
                next(iter(self.waiting))._close()
            self.waiting[self] = self.loop.call_later(HEAD_SECONDS, self._close)

    def _unwatch(self) -> None:
        if timer := self.waiting.pop(self, None):
            timer.cancel()

    def _close(self) -> None:
        self._unwatch()
        self.transport.abort()


class _Server(uvicorn.Server):
    """Uvicorn's server, which calls `ready` after its start and exits with code 0 after a signal to stop."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self.ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        def stop(signum: int, frame: FrameType | None) -> None:
            """The first signal lets running requests finish; the second one stops at once."""
            self.force_exit = self.should_exit
            self.should_exit = True

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def run(app: FastAPI, held: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE,
        server_header=False,
        http=Guarded,
        ws="none",
        loop="asyncio",
    )
    _Server(config, ready).run(sockets=[held])
    sys.stdout.flush()
