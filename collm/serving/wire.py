"""Requests on the wire. Parsing is strict: an unknown or unsupported field is refused. No web framework here."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from collm.types import Message, Request, Sampling

FIELDS = frozenset({
    "model", "messages", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "stop", "stream",
    "stream_options", "logprobs", "top_logprobs",
})  # fmt: skip
"""Fields that change an answer or its form."""
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "return_token_ids", "parallel_tool_calls", "prompt_cache_key",
    "safety_identifier",
})  # fmt: skip
"""Fields of OpenAI's API that have no effect on an answer and are accepted."""
PENALTY = "would change the distribution that the agent was trained with", "leave it out"
TOOLS = "cannot be called, since an agent answers in text", "describe the actions in a message's text, and leave it out"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "n": ((1,), "asks for several answers where a request has one", "send as many requests with different seeds"),
    "presence_penalty": ((0,), *PENALTY),
    "frequency_penalty": ((0,), *PENALTY),
    "repetition_penalty": ((1,), *PENALTY),
    "logit_bias": (({},), *PENALTY),
    "min_p": ((0,), *PENALTY),
    "tools": (([],), *TOOLS),
    "functions": (([],), *TOOLS),
    "tool_choice": (("none", "auto"), *TOOLS),
    "function_call": (("none", "auto"), *TOOLS),
    "modalities": ((["text"],), "asks for more than text, which is all that an agent writes", "leave it out"),
    "response_format": (
        ({"type": "text"},), "constrains an answer, which is sampled freely", "name the format in a message, and leave it out",
    ),
}  # fmt: skip
"""Fields that are not supported: their neutral values, which are accepted, and the reason and the way out of a refusal."""
MOST_MESSAGES = 1024
MOST_STOPS, LONGEST_STOP = 16, 1024
"""Greatest number of stop strings, and of characters in one."""
MOST_TOP = 20
"""Greatest `top_logprobs`."""
ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
"""Role in a request -> role in the chat."""
UNUSED = frozenset({"refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content"})
"""Fields of a message that clients send back from an answer; accepted while they hold nothing."""


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
    """One parsed request: the engine's request, and the form of the answer."""

    request: Request
    stop: tuple[str, ...] = ()
    """The answer is cut before the first of these texts."""
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with the numbers of tokens."""
    logprobs: bool = False
    top: int = 0
    """Number of likeliest tokens, with their log-probs, at each position."""


def dumps(value: Any) -> bytes:
    """JSON in ASCII, which can hold any text, lone surrogates included."""
    return json.dumps(value, allow_nan=False).encode("ascii")


def refuse(field: str, value: Any, reason: str, way_out: str, *, param: str = "", code: str = "invalid_request") -> Refused:
    """The refusal of a field's value, in one sentence. param: the place that is named, if it is not the field."""
    status = 404 if code == "model_not_found" else 400
    return Refused(status, f"{_cut(field)}={_shown(value)} {reason}; {way_out}", param=_cut(param or field), code=code)


def unknown_model(name: Any, agent: str) -> Refused:
    return refuse("model", name, "is not served here", f"this server's only model is {agent!r}", code="model_not_found")


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(value: Any) -> str:
    try:
        return _cut(json.dumps(value))
    except RecursionError:
        return "..."


def parse(body: bytes, agent: str, *, max_tokens: int, vocabulary: int) -> Asked:
    """Parse the request in an HTTP body; null counts as absent. Raises Refused, naming the field.

    Args:
        max_tokens: default length of an answer.
        vocabulary: token ids must be below it.
    """
    try:
        asked = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise Refused(400, f"the body is not JSON ({reason}); send one JSON object", code="invalid_json") from None
    if not isinstance(asked, dict):
        reason = f"the body is {_shown(asked)}, which is not an object; send one JSON object"
        raise Refused(400, reason, code="invalid_json")
    asked = _given(asked)
    for name, value in asked.items():
        if name in NEUTRAL:
            neutral, reason, way_out = NEUTRAL[name]
            if not any(_same(value, one) for one in neutral):
                raise refuse(name, value, reason, way_out, code="unsupported_value")
        elif name not in FIELDS | IGNORED:
            raise refuse(name, value, "is not a field of this server", "leave it out", code="unknown_field")
    model = asked.get("model", agent)
    if model != agent:
        raise unknown_model(model, agent)
    sampling = Sampling(
        temperature=_number(asked, "temperature", 1.0, 0, 100),
        top_p=_number(asked, "top_p", 1.0, 0, 1),
        top_k=_whole(asked, "top_k", 0, 0, 1 << 31),
        max_tokens=_whole(
            asked, "max_completion_tokens" if "max_completion_tokens" in asked else "max_tokens", max_tokens, 1, 1 << 20
        ),
    )
    if 0 < sampling.temperature < 1e-3:
        raise refuse("temperature", sampling.temperature, "is too small to divide by", "give 0 (greedy), or at least 0.001")
    if sampling.top_p == 0:
        raise refuse("top_p", 0, "keeps no token", "give a number above 0, or temperature=0 for greedy answers")
    seed = _whole(asked, "seed", secrets.randbits(62), -(1 << 63), (1 << 63) - 1) & ((1 << 63) - 1)
    logprobs, top = _truth(asked, "logprobs"), _whole(asked, "top_logprobs", 0, 0, MOST_TOP)
    if top and not logprobs:
        raise refuse("top_logprobs", top, "is given without logprobs", "add logprobs=true, or leave it out")
    options = asked.get("stream_options", {})
    if not isinstance(options, dict):
        raise refuse("stream_options", options, "is not an object", 'give {"include_usage": true}, or leave it out')
    usage = _truth(_given(options), "include_usage", "stream_options.")
    request = Request(agent, _messages(asked.get("messages"), vocabulary), sampling, seed)
    return Asked(request, _stops(asked.get("stop", ())), _truth(asked, "stream"), usage, logprobs, top)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Without null fields."""
    return {name: value for name, value in values.items() if value is not None}


def _stops(value: Any) -> tuple[str, ...]:
    stops = ([value] if value else []) if isinstance(value, str) else value
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse("stop", value, "is neither a text nor a list of texts that are not empty", "give one, or leave it out")
    if len(stops) > MOST_STOPS or any(len(stop) > LONGEST_STOP for stop in stops):
        way_out = f"give at most {MOST_STOPS} texts of at most {LONGEST_STOP} characters"
        raise refuse("stop", value, "is more than this server looks for", way_out)
    return tuple(stops)


def _messages(values: Any, vocabulary: int) -> tuple[Message, ...]:
    if not isinstance(values, list) or not values:
        raise refuse("messages", values, "is not a list of at least one message", 'give [{"role": "user", "content": "..."}]')
    if len(values) > MOST_MESSAGES:
        reason = f"has {len(values)} messages, more than {MOST_MESSAGES}"
        raise refuse("messages", values, reason, "leave out the oldest")
    messages = []
    for number, value in enumerate(values):
        place = f"messages[{number}]"
        if not isinstance(value, dict) or not isinstance(value.get("role"), str) or value["role"] not in ROLES:
            raise refuse(place, value, "is not an object with a role that is known here", f"give one of {', '.join(ROLES)}")
        value = _given(value)
        role = ROLES[value["role"]]
        for name, held in value.items():
            if name in ("role", "content", "token_ids", "name") or (name == "type" and held == "text"):
                continue
            if name not in UNUSED or held not in ("", [], {}):
                reason = f"of {place} is not a field of a message here"
                raise refuse(name, held, reason, "leave it out", param=place, code="unknown_field")
        ids = value.get("token_ids")
        if ids is not None:
            sound = role == "assistant" and isinstance(ids, list) and all(type(i) is int for i in ids)
            if not sound or any(not 0 <= i < vocabulary for i in ids):
                reason = f"is not a list of ids from 0 to {vocabulary - 1} in a message of the assistant"
                raise refuse(f"{place}.token_ids", ids, reason, "give those of an earlier answer, or leave it out")
        tokens = None if ids is None else np.array(ids, dtype=np.int32)
        messages.append(Message(role, _text(value.get("content"), place), tokens))
    return tuple(messages)


def _text(content: Any, place: str) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    way_out = "give a text, or text parts"
    raise refuse(f"{place}.content", content, "is not text, which is all that an agent reads", way_out, param=place)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _same(value: Any, neutral: Any) -> bool:
    return bool(type(value) is not bool and value == neutral)


def _number(asked: dict[str, Any], name: str, default: float, least: float, most: float) -> float:
    value = asked.get(name, default)
    if type(value) not in (int, float) or not least <= value <= most or not math.isfinite(value):
        raise refuse(name, value, f"is not a number from {least:g} to {most:g}", f"give one, or leave it out for {default:g}")
    return float(value)


def _whole(asked: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = asked.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise refuse(name, value, f"is not a whole number from {least} to {most}", "give one, or leave it out")
    return value


def _truth(asked: dict[str, Any], name: str, place: str = "") -> bool:
    value = asked.get(name, False)
    if not isinstance(value, bool):
        raise refuse(place + name, value, "is neither true nor false", "give one of these, or leave it out")
    return value
