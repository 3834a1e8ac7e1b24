"""Agents on servers: any OpenAI-compatible chat endpoint, one per agent. Without torch.

`generate` returns a completion for every request. A server that is down, slow or answers with invalid data fails only the
episodes that need it, each with the reason.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from collm.errors import ConfigError, EngineError
from collm.types import Completion, Ids, Request, encodable, printable, without_thoughts

try:
    import httpx
except ImportError as _error:
    raise ConfigError("agents on other machines need httpx: pip install 'collm[serve]'.") from _error

if TYPE_CHECKING:
    from collm.models.team import Team

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is repeated."""
LEAST_ROOM, TOKEN_ROOM, SENT_ROOM = 1 << 20, 1 << 10, 16
"""Limit of one HTTP answer in bytes: a constant, plus bytes per sampled token (with its log-prob) and per byte of the request
(whose token ids may be returned)."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The server of one agent. Example: Endpoint("http://10.0.0.5:8000/v1", "main")"""

    url: str
    """The base to which `/chat/completions` is appended."""
    model: str
    """The model name in requests."""
    key: str = ""
    """Bearer token; not sent if empty."""
    token_ids: bool = False
    """Request token ids and log-probs with vLLM's fields, which some servers refuse; `collm serve` always returns them."""

    def __repr__(self) -> str:
        return f"Endpoint({self.url!r}, model={self.model!r})"


def endpoint(agent: str, address: str, *, key_env: str = "", token_ids: bool = False) -> Endpoint:
    """The endpoint of an address `http://host:port/v1` or `http://host:port/v1#model`; an empty path becomes "/v1".

    Without #model the model name is the agent's name, as `collm serve` offers it. key_env: environment variable that holds the
    API key. Raises ConfigError.
    """
    plain, _, model = address.partition("#")
    try:
        parts = urlsplit(plain)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        sound = False
    if not sound or parts.query or any(c.isspace() for c in plain):
        raise ConfigError(
            f"{agent}={address!r} is not a server's address. Write http://host:port/v1, or http://host:port/v1#model."
        )
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the address of {agent} holds a user name or a password, which would be shown in messages. Keep the key in an "
            "environment variable, and name that."
        )
    key = os.environ.get(key_env, "") if key_env else ""
    if key_env and not key:
        raise ConfigError(f"the environment variable {key_env!r}, which should hold the API key, is not set.")
    if not key.isascii() or any(c.isspace() for c in key):
        raise ConfigError(f"the API key in the environment variable {key_env!r} holds spaces or characters beyond ASCII.")
    path = parts.path.rstrip("/")
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path or '/v1'}", model or agent, key, token_ids)


class Usage(NamedTuple):
    """Tokens of one answer as its server reports them; None for a number that it does not report."""

    prompt_tokens: int | None
    sampled_tokens: int | None


class Unsent(EngineError):
    """No server has received the request, so it cost no tokens."""


@dataclass(slots=True)
class Cost:
    """What the answers of one agent cost."""

    requests: int = 0
    """HTTP requests, retries included."""
    prompt_tokens: int | None = 0
    """Tokens read; None if the server did not report them for every request that it received, failed ones included."""
    sampled_tokens: int | None = 0
    """Likewise."""
    seconds: float = 0.0
    """Sum over answers of the time from a request to its answer, retries and waits included."""

    def add(self, usage: Usage, seconds: float) -> None:
        """Add one answer."""
        for name, tokens in usage._asdict().items():
            total = getattr(self, name)
            setattr(self, name, None if tokens is None or total is None else total + tokens)
        self.seconds += seconds


class HttpEngine:
    """Answers each agent's requests with its server; all requests of a call are sent concurrently.

    It cannot train, since new weights do not reach the servers. Example: HttpEngine({"main": endpoint("main", url)})

    Args:
        connect, read: timeouts in seconds, for the connection and for one whole answer.
        retries: attempts after the first one, on a refused or broken connection, a 429 or a 5xx.
        backoff: seconds before the first retry, doubled for each further one. A jitter from the request's seed shortens a wait
            by up to half. A Retry-After header replaces the wait.
        longest_wait: maximum of a wait, in seconds; a longer Retry-After fails the request.
        max_requests: HTTP requests over the engine's life, retries included; later requests fail.
        concurrency: maximum number of concurrent requests.
        thinking: as `team.thinking`; whether a model thinks is its server's choice.
    """

    trains = False

    def __init__(
        self,
        endpoints: Mapping[str, Endpoint],
        *,
        connect: float = 5.0,
        read: float = 120.0,
        retries: int = 4,
        backoff: float = 0.5,
        longest_wait: float = 60.0,
        max_requests: int | None = None,
        concurrency: int = 64,
        thinking: str = "off",
    ):
        self.endpoints = dict(endpoints)
        self.connect, self.read, self.retries, self.backoff = connect, read, retries, backoff
        self.longest_wait, self.max_requests, self.concurrency = longest_wait, max_requests, concurrency
        self.shown = thinking == "shown"
        self.costs = {agent: Cost() for agent in self.endpoints}
        """Agent -> what its answers cost so far."""
        self._count = threading.Lock()
        here = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}  # no proxy for this machine
        self._client = httpx.Client(
            timeout=httpx.Timeout(read, connect=connect),
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
            headers={"accept": "application/json", "accept-encoding": "identity"},
            mounts=here,
        )

    def load(self, team: Team) -> None:
        """Servers keep their weights."""

    def rest(self) -> None:
        """Servers keep their memory."""

    def close(self) -> None:
        self._client.close()

    @property
    def sent(self) -> int:
        """Number of HTTP requests, retries included."""
        return sum(cost.requests for cost in self.costs.values())

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if not requests:
            return []
        with ThreadPoolExecutor(min(self.concurrency, len(requests)), thread_name_prefix="collm-http") as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Request) -> Completion:
        place = self.endpoints.get(request.agent)
        if place is None:
            known = ", ".join(self.endpoints) or "nobody"
            return failed(request.agent, f"no server is known for {request.agent}; there is one for {known}")
        began, usage = time.monotonic(), Usage(None, None)
        try:
            body = self._ask(request, place)
            usage = read_usage(body)
            completion = read_answer(request.agent, body)
        except Unsent as error:
            usage, completion = Usage(0, 0), failed(request.agent, str(error))
        except EngineError as error:
            completion = failed(request.agent, str(error))
        with self._count:
            self.costs[request.agent].add(usage, time.monotonic() - began)
        text = completion.text if self.shown else without_thoughts(completion.text)
        return completion if text == completion.text else replace(completion, text=text, written=completion.text)

    def _ask(self, request: Request, place: Endpoint) -> bytes:
        """The body of an HTTP answer with status 200, after retries. Raises EngineError, Unsent where no server was reached."""
        body = json.dumps(payload(request, place)).encode()
        room = LEAST_ROOM + TOKEN_ROOM * request.sampling.max_tokens + SENT_ROOM * len(body)
        jitter = random.Random(request.seed)
        failure: type[EngineError] = Unsent
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * (1 - 0.5 * jitter.random())
            try:
                status, headers, text = self._post(request.agent, place, body, room)
            except Unsent as error:
                raise failure(str(error)) from None  # an attempt before may have been received
            except (httpx.ConnectError, httpx.ConnectTimeout, httpx.NetworkError, httpx.RemoteProtocolError) as error:
                reason = f"cannot be reached: {_first_line(error)}"
                failure = failure if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) else EngineError
            except httpx.TimeoutException as error:
                raise EngineError(f"{place.url} gave no answer within {self.read:g} s") from error
            except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
                raise EngineError(f"{place.url}: {_first_line(error)}") from error
            else:
                if status == 200:
                    return text
                reason, failure = f"answered {status}: {_reason(text)}", EngineError
                if status not in RETRIED:
                    raise EngineError(f"{place.url} {reason}")
                named = retry_after(headers.get("retry-after", ""))
                if named is not None and named > self.longest_wait:
                    raise EngineError(
                        f"{place.url} {reason} (it asks for a wait of {named:.0f} s, more than {self.longest_wait:g})"
                    )
                wait = wait if named is None else named
            if attempt < self.retries:
                time.sleep(min(wait, self.longest_wait))
        attempts = f" ({self.retries + 1} attempts)" if self.retries else ""
        raise failure(f"{place.url} {reason}{attempts}")

    def _post(self, agent: str, place: Endpoint, body: bytes, room: int) -> tuple[int, httpx.Headers, bytes]:
        """Send one HTTP request; returns status, headers and a body of at most `room` bytes. An answer that takes longer than
        `read` seconds in total is aborted."""
        with self._count:
            if self.max_requests is not None and self.sent >= self.max_requests:
                raise Unsent(f"the budget of {self.max_requests} requests is spent")
            self.costs[agent].requests += 1
        headers = {"content-type": "application/json"}
        if place.key:
            headers["authorization"] = f"Bearer {place.key}"
        late = time.monotonic() + self.read
        with self._client.stream("POST", f"{place.url}/chat/completions", content=body, headers=headers) as response:
            text = bytearray()
            for chunk in response.iter_bytes():
                text += chunk
                if len(text) > room:
                    raise EngineError(
                        f"{place.url} answered with more than {room} bytes, which no answer of rollout.max_tokens tokens needs"
                    )
                if time.monotonic() > late:
                    raise httpx.ReadTimeout("it drips")
            return response.status_code, response.headers, bytes(text)


def failed(agent: str, reason: str) -> Completion:
    return Completion(agent, "", finish_reason="error", error=reason)


def payload(request: Request, place: Endpoint) -> dict[str, Any]:
    """The JSON body of a request. Token ids of earlier answers are included, so that the server reads what it sampled."""
    sampling = request.sampling
    messages: list[dict[str, Any]] = []
    for message in request.messages:
        sent: dict[str, Any] = {"role": message.role, "content": message.text}
        if message.token_ids is not None:
            sent["token_ids"] = message.token_ids.tolist()
        messages.append(sent)
    body: dict[str, Any] = {
        "model": place.model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": request.seed,
    }
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if place.token_ids:
        body |= {"logprobs": True, "return_token_ids": True}
    return body


def read_answer(agent: str, body: bytes) -> Completion:
    """Parse an HTTP answer into a completion, with token ids and log-probs if they are included. Raises EngineError."""
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        if not isinstance(text, str | None):
            raise ValueError(f"the answer's content is {type(text).__name__}, not text")
        text = text if text is None else encodable(text)
        logprobs = choice.get("token_logprobs")
        if logprobs is None and (choice.get("logprobs") or {}).get("content") is not None:
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
        token_ids, prompt_ids = _ids(choice.get("token_ids")), _ids(answer.get("prompt_token_ids"))
        if logprobs is not None:
            logprobs = np.array(logprobs, dtype=np.float32)
            if logprobs.ndim != 1 or not np.isfinite(logprobs).all():
                raise ValueError("a log-prob is not a finite number")
            if token_ids is not None and len(token_ids) != len(logprobs):
                raise ValueError(f"{len(logprobs)} log-probs for {len(token_ids)} tokens")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineError(f"the server's answer cannot be read: {_first_line(error)}") from error
    finish = "length" if choice.get("finish_reason") == "length" else "stop"
    return Completion(agent, text or "", prompt_ids, token_ids, logprobs, finish)  # type: ignore[arg-type]


def read_usage(body: bytes) -> Usage:
    """The numbers of tokens in an HTTP answer."""
    try:
        usage = json.loads(body)["usage"]
    except (ValueError, KeyError, TypeError, RecursionError):
        usage = None
    found = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return Usage(*(number if type(number) is int and 0 <= number < 1 << 31 else None for number in found))


def _ids(values: Any) -> Ids | None:
    if values is None:
        return None
    if not isinstance(values, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in values):
        raise ValueError("token ids are not a list of whole numbers")
    return np.array(values, dtype=np.int32)


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None if it cannot be parsed."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _reason(body: bytes) -> str:
    """The error message of an HTTP answer, on one line."""
    try:
        answer = json.loads(body)
        error = answer.get("error", answer.get("detail", answer))
        said = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError, RecursionError):
        said = body[:1000].decode("utf-8", "replace")
    return printable(" ".join(str(said)[:10_000].split())[:300]) or "nothing more"


def _first_line(error: Exception) -> str:
    return printable(f"{type(error).__name__}: {str(error).strip()[:300]}".split("\n")[0].rstrip(": "))
