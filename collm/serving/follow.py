"""Follows an answer while it is sampled: stop strings, the likeliest tokens, and text to stream."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from collm.algorithms.logprobs import likeliest
from collm.serving.wire import Asked
from collm.types import THOUGHT, THOUGHT_END, Completion


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token: its id, its log-prob, and the likeliest tokens in its place, as (id, log-prob)."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer: text that is final, and the tokens sampled since the last piece."""

    text: str
    tokens: tuple[Token, ...]


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the stop string whose occurrence ends first (of several that end there, the one that begins first), and
    whether there is one. Reading the text in pieces of any size finds the same one."""
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def settled(text: str, marks: Sequence[str]) -> str:
    """The text that further tokens leave as it is: without an incomplete character, and without an ending that may become one
    of `marks`."""
    text = text.rstrip("\ufffd")
    held = 0
    for mark in marks:
        begins = (size for size in range(min(len(mark) - 1, len(text)), held, -1) if text[-size] == mark[0])
        held = next((size for size in begins if text.endswith(mark[:size])), held)
    return text[: len(text) - held]


class Follower:
    """Observes one answer while it is sampled (an `Observer` of the local engine): ends it at a stop string, collects the
    likeliest tokens, and releases text that is final.

    Args:
        read: token ids -> the visible text, thoughts left out unless they are shown.
        release: called with each piece of a streamed answer; None for an answer in one piece.
    """

    def __init__(self, asked: Asked, read: Callable[[list[int]], str], release: Callable[[Piece], object] | None = None):
        self.asked, self.read, self.release = asked, read, release
        self.tokens: list[Token] = []
        self._sent, self._num_sent = "", 0

    def __call__(self, token: int, logprob: float, logits_V: Tensor) -> bool:
        self.tokens.append(Token(token, logprob, self._likeliest(logits_V)))
        if not self.asked.stop and self.release is None:
            return False
        text, ended = cut(self.read([each.id for each in self.tokens]), self.asked.stop)
        if self.release is not None and not ended:
            piece = self.piece(settled(text, (*self.asked.stop, THOUGHT, THOUGHT_END)))
            if piece.text:
                self.release(piece)
        return ended

    def piece(self, text: str) -> Piece:
        """What an answer so far, or a whole one, has beyond the former pieces."""
        # Text before a thought disappears when the thought begins.
        known = len(os.path.commonprefix([self._sent, text]))  # noqa: RUF071
        piece = Piece(text[known:], tuple(self.tokens[self._num_sent :]))
        self._sent = text
        if piece.text:
            self._num_sent = len(self.tokens)
        return piece

    def _likeliest(self, logits_V: Tensor) -> tuple[tuple[int, float], ...]:
        if not self.asked.top:
            return ()
        return tuple(likeliest(logits_V, self.asked.top, **self.asked.request.sampling.distribution()))


def tokens_of(completion: Completion) -> list[Token]:
    """The tokens of an answer that was not followed."""
    if completion.token_ids is None or completion.logprobs is None:
        return []
    return [Token(*pair) for pair in zip(completion.token_ids.tolist(), completion.logprobs.tolist(), strict=True)]


def ended(completion: Completion, stops: Sequence[str]) -> Completion:
    """The completion, cut at the first stop string."""
    text, found = cut(completion.text, stops)
    return replace(completion, text=text, finish_reason="stop") if found else completion
