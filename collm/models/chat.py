"""The only owner of chat templates: turns an agent's history into token ids, safely.

Three promises. Texts from worlds and agents are encoded with special tokens disabled, so no message can forge a chat turn.
An answer that was sampled keeps its sampled ids; text is never re-tokenized. And what the template adds around a message
does not depend on the message, so a growing chat is a growing prefix wherever the template allows one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import TemplateError

from collm.errors import ConfigError
from collm.types import Ids, Message

_OPEN, _CLOSE = "\ue000", "\ue001"


class Chat:
    """Renders histories with one tokenizer's chat template.

    Example: Chat(tokenizer).encode((Message("user", "Name a colour"),)) -> array([0, 17, 31, 3, 1], dtype=int32), the ids up to
    and including the mark after which the model answers.
    """

    def __init__(self, tokenizer: Any, stop_ids: Iterable[int] = ()):
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
        self._stops = {tokenizer.eos_token_id, *stop_ids}
        self._plain = lru_cache(maxsize=65536)(self._encode_plain)
        self._markup = lru_cache(maxsize=4096)(self._encode_markup)
        self._frames = lru_cache(maxsize=1024)(self._render_frames)

    def encode(self, messages: Sequence[Message], *, answer: bool = True) -> Ids:
        """Token ids of a history; with `answer`, up to the mark after which the model is to answer."""
        frames = self._frames(tuple(message.role for message in messages), answer)
        ids: list[int] = list(self._markup(frames[0]))
        for message, frame in zip(messages, frames[1:], strict=True):
            following = self._markup(frame)
            if message.token_ids is None:
                ids.extend(self._plain(message.text))
            else:
                sampled = message.token_ids.tolist()
                ids.extend(sampled)
                if sampled and sampled[-1] in self._stops and sampled[-1] in following:
                    following = following[following.index(sampled[-1]) + 1 :]  # the end mark was sampled: not a second time
            ids.extend(following)
        return np.asarray(ids, dtype=np.int32)

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of a text from a world or an agent, in which nothing is special."""
        return self._plain(text)

    def decode(self, ids: Any) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forget(self) -> None:
        """Drop what is remembered of texts encoded before; for processes that live long and read what strangers write."""
        for memory in (self._plain, self._markup, self._frames):
            memory.cache_clear()

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
        return tuple(encoded["input_ids"])

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render_frames(self, roles: tuple[str, ...], answer: bool) -> list[str]:
        """What the template puts before, between and after messages of these roles: len(roles) + 1 texts."""
        marks = [f"{_OPEN}{index}{_CLOSE}" for index in range(len(roles))]
        chat = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer)
        except (TemplateError, ValueError, TypeError) as error:
            raise self._refused(roles, f"fails: {error}") from error
        if any(rendered.count(mark) != 1 for mark in marks) or sorted(marks, key=rendered.index) != marks:
            raise self._refused(roles, "drops, repeats or reorders messages")
        frames = []
        for mark in marks:
            before, _, rendered = rendered.partition(mark)
            frames.append(before)
        return [*frames, rendered]

    def _refused(self, roles: tuple[str, ...], reason: str) -> ConfigError:
        return ConfigError(
            f"the chat template of {self.tokenizer.name_or_path!r} {reason} (roles: {', '.join(roles)}). Use another model, or "
            "mend its chat_template.jinja."
        )
