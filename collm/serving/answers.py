"""Answers on the wire, in OpenAI's format. No web framework here."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from collm.serving.follow import Piece, Token
from collm.serving.wire import Asked, Refused, dumps
from collm.types import Completion


@dataclass(frozen=True, slots=True)
class Form:
    """Writes the answer to one request.

    Additional fields: `prompt_token_ids`, and in a choice `token_ids` and `token_logprobs` (natural logs, under the
    distribution that was sampled from), of all that was sampled.
    """

    asked: Asked
    spell: Callable[[int], str]
    """The text of one token."""
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, completion: Completion, tokens: Sequence[Token]) -> bytes:
        """An answer in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": completion.text},
            "finish_reason": completion.finish_reason,
            "logprobs": self._logprobs(tokens),
            "token_ids": _plain(completion.token_ids),
            "token_logprobs": _plain(completion.logprobs),
        }
        ids = {"prompt_token_ids": _plain(completion.prompt_ids)}
        return dumps({**self._frame("chat.completion"), "choices": [choice], **ids, "usage": _usage(completion)})

    def first(self) -> bytes:
        """The event that begins a stream."""
        return self._event({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> bytes:
        """The event of one piece of a streamed answer."""
        return self._event({"content": piece.text}, piece.tokens)

    def last(self, completion: Completion) -> bytes:
        """The events that end a stream."""
        events = self._event({}, finish_reason=completion.finish_reason)
        if self.asked.usage:
            events += _data(dumps({**self._frame("chat.completion.chunk"), "choices": [], "usage": _usage(completion)}))
        return events + _data(b"[DONE]")

    @staticmethod
    def failed(error: Refused) -> bytes:
        """The event that ends a stream whose answer failed after its beginning."""
        return _data(error.body())

    def _event(self, delta: dict[str, str], tokens: Sequence[Token] = (), finish_reason: str | None = None) -> bytes:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self.asked.usage else {}
        return _data(dumps({**self._frame("chat.completion.chunk"), "choices": [choice], **usage}))

    def _frame(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.request.agent}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        entries = [{**self._entry(t.id, t.logprob), "top_logprobs": [self._entry(*top) for top in t.top]} for t in tokens]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.spell(token)
        part = "\ufffd" in text  # of a character
        return {"token": text, "logprob": logprob, "bytes": None if part else list(text.encode("utf-8", "replace"))}


def _usage(completion: Completion) -> dict[str, int]:
    """Numbers of tokens."""
    read, written = (len(_plain(ids)) for ids in (completion.prompt_ids, completion.token_ids))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _data(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


def _plain(array: np.ndarray | None) -> list[Any]:
    return [] if array is None else array.tolist()
