"""Requests and answers on the wire. Parsing is strict: an unknown or unsupported field is refused. No web framework here."""

from __future__ import annotations

import json
import math
import secrets
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from collm.types import Completion, Message, Request, Sampling

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "stream_options", "return_token_ids", "parallel_tool_calls"})
"""Fields of OpenAI's API that have no effect on an answer and are accepted."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "stop": ([], ""),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}
"""Fields that are not supported, with their neutral values, which are accepted."""
MOST_MESSAGES = 1024
ROLES = ("system", "user", "assistant")


class Refused(Exception):
    """A request that cannot be answered: HTTP status, invalid field, and a message with the way out."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> bytes:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return dumps({"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}})


@dataclass(frozen=True, slots=True)
class Asked:
    """One parsed request: the engine's request, and the form of the answer (streamed, with log-probs)."""

    request: Request
    stream: bool
    logprobs: bool


def dumps(value: Any) -> bytes:
    """JSON in ASCII, which can hold any text, lone surrogates included."""
    return json.dumps(value, allow_nan=False).encode("ascii")


def parse(body: bytes, agent: str, *, max_tokens: int, vocabulary: int) -> Asked:
    """Parse the request in an HTTP body. max_tokens: default length of an answer. vocabulary: token ids must be below it.

    Raises Refused, naming the field.
    """
    try:
        asked = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {type(error).__name__}: {str(error)[:200]}", code="invalid_json") from None
    if not isinstance(asked, dict):
        raise Refused(400, "the body is not a JSON object", code="invalid_json")
    fields = {"model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "stream"}
    for name, value in asked.items():
        if name in NEUTRAL and value is not None and not any(_same(value, neutral) for neutral in NEUTRAL[name]):
            raise Refused(400, f"{name!r} is not offered here; leave it out", param=name, code="unsupported_value")
        if name not in fields and name not in IGNORED and name not in NEUTRAL and name != "logprobs":
            shown = name if len(name) <= 60 else f"{name[:60]}..."
            raise Refused(400, f"unknown field {shown!r}", param=shown, code="unknown_field")
    model = asked.get("model", agent)
    if model != agent:
        shown = repr(model)[:80]
        raise Refused(404, f"this server has no model {shown}; it serves {agent!r}", param="model", code="model_not_found")
    longest = asked.get("max_completion_tokens")
    sampling = Sampling(
        temperature=_number(asked, "temperature", 1.0, 0, 100),
        top_p=_number(asked, "top_p", 1.0, 0, 1),
        top_k=_whole(asked, "top_k", 0, 0, 1 << 31),
        max_tokens=_whole(asked, "max_tokens" if longest is None else "max_completion_tokens", max_tokens, 1, 1 << 20),
    )
    if 0 < sampling.temperature < 1e-3:
        raise Refused(400, "'temperature' is 0 (greedy) or at least 0.001", param="temperature")
    if sampling.top_p == 0:
        raise Refused(400, "'top_p' must be above 0", param="top_p")
    seed = _whole(asked, "seed", secrets.randbits(62), -(1 << 63), (1 << 63) - 1) & ((1 << 63) - 1)
    request = Request(agent, _messages(asked.get("messages"), vocabulary), sampling, seed)
    return Asked(request, _truth(asked, "stream"), _truth(asked, "logprobs"))


def _messages(values: Any, vocabulary: int) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise Refused(400, "'messages' must be a list of at least one message", param="messages")
    if len(values) > MOST_MESSAGES:
        raise Refused(400, f"'messages' holds {len(values)} messages; {MOST_MESSAGES} are the most", param="messages")
    messages = []
    for number, value in enumerate(values):
        place = f"messages[{number}]"
        if not isinstance(value, dict) or value.get("role") not in ROLES:
            raise Refused(400, f"{place} must be an object whose role is one of {', '.join(ROLES)}", param=place)
        if extra := sorted(set(value) - {"role", "content", "token_ids", "name"}):
            raise Refused(400, f"{place} has an unknown field {extra[0][:60]!r}", param=place, code="unknown_field")
        ids = value.get("token_ids")
        if ids is not None:
            sound = value["role"] == "assistant" and isinstance(ids, list) and all(type(i) is int for i in ids)
            if not sound or any(not 0 <= i < vocabulary for i in ids):
                raise Refused(
                    400, f"{place}.token_ids must be ids of this model's tokens, of its own answer", param=f"{place}.token_ids"
                )
        tokens = None if ids is None else np.array(ids, dtype=np.int32)
        messages.append(Message(value["role"], _text(value.get("content"), place), tokens))
    return tuple(messages)


def _text(content: Any, place: str) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise Refused(400, f"{place}.content must be text", param=place)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _same(value: Any, neutral: Any) -> bool:
    return bool(type(value) is not bool and value == neutral)


def _number(asked: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = asked.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
        raise Refused(400, f"{name!r} must be a number from {least:g} to {most:g}", param=name)
    return float(value)


def _whole(asked: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = asked.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"{name!r} must be a whole number from {least} to {most}", param=name)
    return value


def _truth(asked: dict[str, Any], name: str) -> bool:
    value = asked.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name!r} must be true or false", param=name)
    return bool(value)


def answer(asked: Asked, completion: Completion, pieces: list[str], identity: str) -> dict[str, Any]:
    """The answer in OpenAI's format, with the additional fields `token_ids`, `token_logprobs` (natural logs, under the
    distribution that was sampled from) and `prompt_token_ids`. pieces: the text of each token."""
    ids, prompt, logprobs = _plain(completion.token_ids), _plain(completion.prompt_ids), _plain(completion.logprobs)
    content = [
        {"token": piece, "logprob": value, "bytes": list(piece.encode("utf-8", "replace")), "top_logprobs": []}
        for piece, value in zip(pieces, logprobs, strict=True)
    ]
    return {
        "id": identity,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": completion.agent,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": completion.text},
                "finish_reason": completion.finish_reason,
                "logprobs": {"content": content} if asked.logprobs else None,
                "token_ids": ids,
                "token_logprobs": logprobs,
            }
        ],
        "prompt_token_ids": prompt,
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)},
    }


def events(whole: dict[str, Any]) -> bytes:
    """The same answer as server-sent events, with the whole text in one event."""
    (choice,) = whole["choices"]
    frame = {key: whole[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    first = {"index": 0, "delta": choice["message"], "finish_reason": None, "logprobs": choice["logprobs"]}
    last = {"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}
    chunks = [dumps({**frame, "choices": [one]}) for one in (first, last)]
    return b"".join(b"data: " + chunk + b"\n\n" for chunk in [*chunks, b"[DONE]"])


def _plain(array: np.ndarray | None) -> list[Any]:
    return [] if array is None else array.tolist()
