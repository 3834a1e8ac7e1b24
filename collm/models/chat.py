"""Chat templates: the only module that converts an agent's history to token ids.

Three guarantees. Texts from environments and agents are encoded with special tokens disabled, so a message cannot forge a chat
turn. A sampled answer keeps its sampled ids and is not re-tokenized. The template's text around a message does not depend on
the message, so a growing chat is a growing prefix wherever the template allows one.

Templates of thinking models drop the thoughts of earlier answers. The effect of such a template is measured once and then
applied to the sampled ids. A later prompt then does not begin with an earlier one, and each such turn is a separate sequence.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from collm.errors import ConfigError
from collm.models.loading import load_pretrained, max_positions_of, stop_ids_of
from collm.models.sources import base_named_by, is_adapter
from collm.types import Ids, Message

_OPEN, _CLOSE = "\ue000", "\ue001"
THOUGHT_END = "</think>"
_DAY = datetime.datetime(2025, 1, 1)
"""The date for templates that contain today's date, so that a run does not depend on the day."""


class Chat:
    """Renders histories with one tokenizer's chat template.

    Example: Chat(tokenizer).encode((Message("user", "Name a colour"),)) -> array([0, 17, 31, 3, 1], dtype=int32), the ids up to
    and including the mark after which the model answers.
    Args: stop_ids: ids that end an answer, beside the tokenizer's end of text. max_positions: maximum length of a sequence, in
    tokens. keep_thoughts: keep thoughts of earlier answers
    even if the template drops them, for critics.
    """

    def __init__(
        self, tokenizer: Any, stop_ids: Iterable[int] = (), *, max_positions: int = 1 << 30, keep_thoughts: bool = False
    ):
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; add chat_template.jinja to its folder "
                "or choose an instruction-tuned model."
            )
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ConfigError(
                f"the tokenizer of {tokenizer.name_or_path!r} encodes text to nothing; is tokenizer.json missing?"
            )
        self.tokenizer = tokenizer
        self.keep_thoughts = keep_thoughts
        self.max_positions = max_positions
        self.stop_ids = sorted({*stop_ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
        self._plain = lru_cache(maxsize=65536)(self._encode_plain)
        self._markup = lru_cache(maxsize=4096)(self._encode_markup)
        self._frames = lru_cache(maxsize=1024)(self._render_frames)

    @classmethod
    def from_pretrained(cls, source: str) -> Chat:
        """Chat template, stop ids and limit of a model, read from its folder or hub name without its weights.

        An engine that runs elsewhere, or a server, needs no more of a model. For an adapter they are those of its base.
        Raises ConfigError where they cannot be loaded.
        """
        source = base_named_by(source) if is_adapter(source) else source
        config = load_pretrained(AutoConfig, source)
        return cls(load_pretrained(AutoTokenizer, source), stop_ids_of(source, config), max_positions=max_positions_of(config))

    def encode(self, messages: Sequence[Message], *, answer: bool = True) -> Ids:
        """Token ids (L,) of a history; with `answer`, up to the mark after which the model is to answer."""
        frames = self._frames(tuple(message.role for message in messages), answer)
        newest = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
        ids: list[int] = list(self._markup(frames[0]))
        for i, (message, frame) in enumerate(zip(messages, frames[1:], strict=True)):
            following = self._markup(frame)
            said = self._earlier(message) if message.role == "assistant" and i < newest else self._said(message)
            ids.extend(said)
            if message.token_ids is not None and said and said[-1] in self.stop_ids and said[-1] in following:
                following = following[following.index(said[-1]) + 1 :]  # the end mark was sampled already
            ids.extend(following)
        return np.asarray(ids, dtype=np.int32)

    @cached_property
    def instead_of_thoughts(self) -> str | None:
        """The template's replacement for the thoughts of an earlier answer; None if it keeps the thoughts.

        It includes the line breaks after thoughts if the template keeps those.
        """
        if self.keep_thoughts:
            return None
        marks = [f"{_OPEN}{letter}{_CLOSE}" for letter in "qtaq"]
        roles = ("user", "assistant", "user")
        rendered = self._render(roles, (marks[0], f"<think>\n{marks[1]}\n{THOUGHT_END}\n\n{marks[2]}", marks[3]), True)
        if marks[1] in rendered or rendered.count(marks[2]) != 1:
            return None
        before, between, _ = self._frames(roles, True)[:3]
        return rendered.partition(marks[2])[0].removeprefix(before + marks[0] + between)

    @cached_property
    def grows(self) -> bool:
        """Whether each prompt begins with the previous prompt and answer, so that one sequence holds all turns."""
        for text in ("a", f"<think>\nt\n{THOUGHT_END}\n\na"):
            asked = Message("user", "q")
            answered = np.concatenate([self.encode((asked,)), self.text_ids(text)])
            later = self.encode((asked, Message("assistant", text, np.asarray(self.text_ids(text), dtype=np.int32)), asked))
            if not np.array_equal(later[: len(answered)], answered):
                return False
        return True

    def _said(self, message: Message) -> list[int]:
        return list(self._plain(message.text)) if message.token_ids is None else message.token_ids.tolist()

    def _earlier(self, message: Message) -> list[int]:
        """Ids of an earlier answer in later prompts: without its thoughts if the template drops them."""
        instead = self.instead_of_thoughts if THOUGHT_END in message.text else None
        if instead is None:
            return self._said(message)
        answer = message.text.rpartition(THOUGHT_END)[2]
        if instead.strip("\n") or not instead:
            answer = answer.lstrip("\n")
        else:
            instead = ""  # the line breaks stay in the answer
        said = self._said(message)
        end = said[-1:] if message.token_ids is not None and said and said[-1] in self.stop_ids else []
        kept = self._tail_that_reads(said[: len(said) - len(end)], answer)
        return [*self._markup(instead), *(self._plain(answer) if kept is None else kept), *end]

    def _tail_that_reads(self, ids: list[int], text: str) -> list[int] | None:
        """The last ids of a list that decode to `text`; None if the text does not begin at a boundary between two ids."""
        low, high = 0, len(ids)
        while low < high:  # a shorter tail has a shorter text, except at a character whose bytes are split
            middle = (low + high) // 2
            if len(self.decode(ids[middle:])) > len(text):
                low = middle + 1
            else:
                high = middle
        near = range(min(low + 4, len(ids)), max(low - 5, -1), -1)
        return next((ids[cut:] for cut in near if self.decode(ids[cut:]) == text), None)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text from an environment or an agent, without special tokens."""
        return self._plain(text)

    def decode(self, ids: Any) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forget(self) -> None:
        """Clear the caches of encoded texts, for long-lived processes that read untrusted texts."""
        for memory in (self._plain, self._markup, self._frames):
            memory.cache_clear()

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be encoded
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render_frames(self, roles: tuple[str, ...], answer: bool) -> list[str]:
        """The template's texts before, between and after messages of these roles: len(roles) + 1 texts."""
        marks = [f"{_OPEN}{index}{_CLOSE}" for index in range(len(roles))]
        rendered = self._render(roles, marks, answer)
        if any(rendered.count(mark) != 1 for mark in marks) or sorted(marks, key=rendered.index) != marks:
            raise self._refused(roles, "drops, repeats or reorders messages")
        frames = []
        for mark in marks:
            before, _, rendered = rendered.partition(mark)
            frames.append(before)
        return [*frames, rendered]

    def _render(self, roles: Sequence[str], texts: Sequence[str], answer: bool) -> str:
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=answer, strftime_now=_DAY.strftime
            )
        except Exception as error:  # a template is an untrusted program
            raise self._refused(roles, f"fails: {error}") from error
        return str(rendered)

    def _refused(self, roles: Sequence[str], reason: str) -> ConfigError:
        return ConfigError(
            f"the chat template of {self.tokenizer.name_or_path!r} {reason} (roles: {', '.join(roles)}). Use another model, or "
            "mend its chat_template.jinja."
        )
