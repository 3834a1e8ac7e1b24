"""Chat templates: the only module that converts an agent's history to token ids, and sampled ids to an answer.

Three guarantees. Texts from environments and agents are encoded with the template's tokens disabled, so a message cannot forge
a chat turn. A sampled answer keeps its sampled ids and is not re-tokenized. What stands before an answer does not depend on it,
so a growing chat is a growing prefix wherever the template allows one.

Template and messages are encoded apart if that gives the ids of the whole rendered chat. Where it does not (tokenizers that put
a space before each text, templates with a space before a message), what stands between two sampled answers is encoded as one
text.

Templates of thinking models drop the thoughts of earlier answers. The effect of such a template is measured once and then
applied to the sampled ids. A later prompt then does not begin with an earlier one, and each such turn is a separate sequence.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from collm.errors import ConfigError
from collm.models.loading import load_pretrained, max_positions_of, stop_ids_of
from collm.models.sources import base_named_by, is_adapter
from collm.models.templates import adapted
from collm.types import THOUGHT, THOUGHT_END, Ids, Message, without_thoughts

_OPEN, _CLOSE = "\ue000", "\ue001"
_DAY = datetime.datetime(2025, 1, 1)
"""The date for templates that contain today's date, so that a run does not depend on the day."""
_ANCHOR = "\n"
"""A text that a text in the middle of a chat is encoded behind, so that no space is put before it."""
TALK = ("user", "assistant", "user")

Piece = tuple[bool, str]
"""(whether the template wrote it, text)."""


class Chat:
    """Renders histories with one tokenizer's chat template.

    Example: Chat(tokenizer).encode((Message("user", "Name a colour"),)) -> array([0, 17, 31, 3, 1], dtype=int32), the ids up to
    and including the mark after which the model answers.
    Args: stop_ids: ids that end an answer, beside the tokenizer's end of text and the template's end of a turn. max_positions:
    maximum length of a sequence, in tokens. keep_thoughts: keep thoughts of earlier answers even if
    the template drops them, for critics. system, thinking: as `team.system` and `team.thinking`; None leaves them to the
    template.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop_ids: Iterable[int] = (),
        *,
        max_positions: int = 1 << 30,
        keep_thoughts: bool = False,
        system: str | None = None,
        thinking: str | None = None,
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
        self._stop_ids = tuple(stop_ids)
        self._shown = thinking == "shown"
        self._plain = lru_cache(maxsize=65536)(self._encode_plain)
        self._markup = lru_cache(maxsize=4096)(self._encode_markup)
        self._joined = lru_cache(maxsize=4096)(self._encode_joined)
        self._frames = lru_cache(maxsize=1024)(self._render_frames)
        self.template = adapted(tokenizer.get_chat_template(), self._frames_of, tokenizer, system=system, thinking=thinking)

    @classmethod
    def from_pretrained(cls, source: str, *, system: str | None = None, thinking: str | None = None) -> Chat:
        """Chat template, stop ids and limit of a model, read from its folder or hub name without its weights.

        An engine that runs elsewhere, or a server, needs no more of a model. For an adapter they are those of its base.
        Raises ConfigError where they cannot be loaded.
        """
        source = base_named_by(source) if is_adapter(source) else source
        config = load_pretrained(AutoConfig, source)
        tokenizer, stops = load_pretrained(AutoTokenizer, source), stop_ids_of(source, config)
        return cls(tokenizer, stops, max_positions=max_positions_of(config), system=system, thinking=thinking)

    def encode(self, messages: Sequence[Message], *, answer: bool = True) -> Ids:
        """Token ids (L,) of a history; with `answer`, up to the mark after which the model is to answer."""
        roles = tuple(message.role for message in messages)
        frames = self._frames(roles, answer)
        newest = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
        ids: list[int] = []
        run: list[Piece] = [(True, frames[0])]
        end: int | None = None  # the end mark, where it was sampled already
        for i, (message, frame) in enumerate(zip(messages, frames[1:], strict=True)):
            before, sampled = self._said(message, earlier=message.role == "assistant" and i < newest)
            if sampled is not None and i:
                run[-1] = (True, self._prompted(roles[:i], frames[i]))
            run += before
            if sampled is not None:
                ids += _after(end, self._run(run, continued=bool(ids))) + sampled
                run, end = [], next((s for s in sampled[-1:] if s in self.stop_ids and s in self._markup(frame)), None)
            run.append((True, frame))
        ids += _after(end, self._run(run, continued=bool(ids)))
        return np.asarray(ids, dtype=np.int32)

    def read(self, ids: Any) -> tuple[str, str | None]:
        """(text, written) of a sampled answer, as `Completion` has them. A thought that the template opens has its mark."""
        written = self._opening + self.decode(ids)
        text = written if self._shown else without_thoughts(written)
        return text, None if text == written else written

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: of the model's files, the tokenizer's end of text, and the template's end of a turn."""
        eos, following = self.tokenizer.eos_token_id, (self._frames(TALK[:2], False)[-1], self._frames(TALK, True)[2])
        ends = [i for text in following for i in self._markup(text) if i in self._marks]
        return sorted({*self._stop_ids, *([] if eos is None else [eos]), *ends[:1]})

    @cached_property
    def together(self) -> bool:
        """Whether template and messages must be encoded as one text to give the ids of the rendered chat."""
        for roles, texts in ((TALK[:1], ("Name a colour",)), (TALK, ("Name a colour", "red", "Again"))):
            frames = self._frames(roles, True)
            apart = [*self._markup(frames[0])]
            for text, frame in zip(texts, frames[1:], strict=True):
                apart += [*self._plain(text), *self._markup(frame)]
            if apart != list(self._markup(self._render(self.template, roles, texts, True))):
                return True
        return False

    @cached_property
    def _opening(self) -> str:
        """The mark of a thought that the template begins for the model, or nothing."""
        return THOUGHT if THOUGHT in self._frames(TALK[:1], True)[-1].rpartition(THOUGHT_END)[2] else ""

    @cached_property
    def _marks(self) -> dict[int, str]:
        """Id -> text of the tokens that no message may hold: special ones, and added ones that the template writes, white space
        aside."""
        texts = [self.template, *self._frames(TALK, True)]
        with contextlib.suppress(ConfigError):  # a template without system messages
            texts += self._frames(("system", "user"), True)
        added = {i: token for i, token in self.tokenizer.added_tokens_decoder.items() if token.content.strip()}
        return {i: token.content for i, token in added.items() if token.special or any(token.content in t for t in texts)}

    @cached_property
    def _unflagged(self) -> re.Pattern[str] | None:
        """Finds the texts of those tokens that are not flagged as special, which a tokenizer would not split."""
        added = self.tokenizer.added_tokens_decoder
        texts = sorted((text for i, text in self._marks.items() if not added[i].special), key=len, reverse=True)
        return re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in texts)) if texts else None

    @cached_property
    def instead_of_thoughts(self) -> str | None:
        """The template's replacement for the thoughts of an earlier answer; None if it keeps the thoughts.

        It includes the line breaks after thoughts if the template keeps those.
        """
        if self.keep_thoughts:
            return None
        marks = [f"{_OPEN}{letter}{_CLOSE}" for letter in "qtaq"]
        thought = f"{THOUGHT}\n{marks[1]}\n{THOUGHT_END}\n\n"
        rendered = self._render(self.template, TALK, (marks[0], thought + marks[2], marks[3]), True)
        if marks[1] in rendered or rendered.count(marks[2]) != 1:
            return None
        before, between, _ = self._frames(TALK, True)[:3]
        return rendered.partition(marks[2])[0].removeprefix(before + marks[0] + between)

    @cached_property
    def grows(self) -> bool:
        """Whether each prompt begins with the previous prompt and answer, so that one sequence holds all turns."""
        for text in ("a", f"{THOUGHT}\nt\n{THOUGHT_END}\n\na"):
            asked = Message("user", "q")
            answered = np.concatenate([self.encode((asked,)), self.text_ids(text)])
            later = self.encode((asked, Message("assistant", text, np.asarray(self.text_ids(text), dtype=np.int32)), asked))
            if not np.array_equal(later[: len(answered)], answered):
                return False
        return True

    def _prompted(self, roles: tuple[str, ...], frame: str) -> str:
        """The template's text before a sampled answer. A space that the template puts before answers, but not at the end of a
        prompt, is left out: the model has sampled its own."""
        if not frame[-1:].isspace():
            return frame
        prompt = self._frames(roles, True)[-1]
        return prompt if frame.startswith(prompt) and frame.removeprefix(prompt).isspace() else frame

    def _said(self, message: Message, *, earlier: bool) -> tuple[list[Piece], list[int] | None]:
        """A message as texts and, after them, the sampled ids that it keeps; None for a message that was not sampled.

        earlier: an answer in a later prompt, without its thoughts if the template drops them.
        """
        sampled = None if message.token_ids is None else message.token_ids.tolist()
        if not earlier or self.instead_of_thoughts is None:
            return ([(False, message.text)], None) if sampled is None else ([], sampled)
        text = message.text if sampled is None else self.decode(sampled)
        if THOUGHT_END not in text:
            return ([(False, text)], None) if sampled is None else ([], sampled)
        instead, answer = self.instead_of_thoughts, text.rpartition(THOUGHT_END)[2]
        if instead.strip("\n") or not instead:
            answer = answer.lstrip("\n")
        else:
            instead = ""  # the line breaks stay in the answer
        end = sampled[-1:] if sampled and sampled[-1] in self.stop_ids else []
        kept = None if sampled is None else self._tail_that_reads(sampled[: len(sampled) - len(end)], answer)
        if kept is None:
            return [(True, instead), (False, answer)], None if sampled is None else end
        return [(True, instead)], kept + end

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
        texts, start = [], 0
        for place, i in enumerate(ids if self._left_out else ()):
            if i in self._left_out:
                texts += [self._decode(ids[start:place]), self._left_out[i]]
                start = place + 1
        return "".join([*texts, self._decode(ids[start:])])

    @cached_property
    def _left_out(self) -> dict[int, str]:
        """Id -> text of marks of thoughts that are special tokens: decoding leaves out the marks, and not the thoughts."""
        added = self.tokenizer.added_tokens_decoder
        return {i: token.content for i, token in added.items() if token.special and token.content in (THOUGHT, THOUGHT_END)}

    def _decode(self, ids: Any) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Write the tokenizer with this template."""
        own = self.tokenizer.chat_template
        try:
            if self.template != self.tokenizer.get_chat_template():
                self.tokenizer.chat_template = self.template
            self.tokenizer.save_pretrained(folder)
        finally:
            self.tokenizer.chat_template = own

    def by_transformers(self, messages: Sequence[Message]) -> list[int]:
        """The prompt ids of texts that transformers' `apply_chat_template` gives with this template."""
        chat = [{"role": message.role, "content": message.text} for message in messages]
        options = {"chat_template": self.template, "add_generation_prompt": True, "strftime_now": _DAY.strftime}
        return list(self.tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options))

    def forget(self) -> None:
        """Clear the caches of encoded texts, for long-lived processes that read untrusted texts."""
        for memory in (self._plain, self._markup, self._joined, self._frames):
            memory.cache_clear()

    def _run(self, run: Sequence[Piece], *, continued: bool) -> list[int]:
        """Ids of consecutive texts. continued: sampled ids stand before them."""
        if self.together:
            return list(self._joined(tuple(run), continued))
        return [i for markup, text in run for i in (self._markup(text) if markup else self._plain(text))]

    def _encode_joined(self, run: tuple[Piece, ...], continued: bool) -> tuple[int, ...]:
        """Ids of consecutive texts, encoded as one; texts that hold a mark of the template's are encoded apart from marks."""
        whole = self._markup_behind("".join(text for _, text in run), continued)
        marks = [i for markup, text in run if markup for i in self._markup(text) if i in self._marks]
        if [i for i in whole if i in self._marks] == marks:
            return whole
        ids, text = [], ""
        by_text = {mark: i for i, mark in self._marks.items()}
        cut = re.compile("(" + "|".join(map(re.escape, sorted(by_text, key=len, reverse=True))) + ")")
        for markup, piece in run:
            for part in cut.split(piece) if markup else [piece]:
                if markup and part in by_text:
                    ids += [*self._plain(text), by_text[part]]
                    text = ""
                else:
                    text += part
        return (*ids, *self._plain(text))

    def _markup_behind(self, text: str, continued: bool) -> tuple[int, ...]:
        """Ids of a template's text; `continued`: without the space that some tokenizers put before a text."""
        anchor = self._markup(_ANCHOR)
        behind = self._encode_markup(_ANCHOR + text) if continued else ()
        return behind[len(anchor) :] if continued and behind[: len(anchor)] == anchor else self._encode_markup(text)

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be encoded
        parts = [text] if self._unflagged is None else self._unflagged.split(text)
        encoded = self.tokenizer(parts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return tuple(i for ids in encoded for i in ids)

    def _encode_markup(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _render_frames(self, roles: tuple[str, ...], answer: bool) -> list[str]:
        return self._frames_of(self.template, roles, answer)

    def _frames_of(self, template: str, roles: Sequence[str], answer: bool) -> list[str]:
        """A template's texts before, between and after messages of these roles: len(roles) + 1 texts."""
        marks = [f"{_OPEN}{index}{_CLOSE}" for index in range(len(roles))]
        rendered = self._render(template, roles, marks, answer)
        if any(rendered.count(mark) != 1 for mark in marks) or sorted(marks, key=rendered.index) != marks:
            raise self._refused(roles, "drops, repeats or reorders messages")
        frames = []
        for mark in marks:
            before, _, rendered = rendered.partition(mark)
            frames.append(before)
        return [*frames, rendered]

    def _render(self, template: str, roles: Sequence[str], texts: Sequence[str], answer: bool) -> str:
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        try:
            rendered = self.tokenizer.apply_chat_template(
                chat, chat_template=template, tokenize=False, add_generation_prompt=answer, strftime_now=_DAY.strftime
            )
        except Exception as error:  # a template is an untrusted program
            raise self._refused(roles, f"fails: {error}") from error
        return str(rendered)

    def _refused(self, roles: Sequence[str], reason: str) -> ConfigError:
        return ConfigError(
            f"the chat template of {self.tokenizer.name_or_path!r} {reason} (roles: {', '.join(roles)}). Use another model, or "
            "mend its chat_template.jinja."
        )


def _after(end: int | None, ids: list[int]) -> list[int]:
    """The ids after an end mark that was sampled already."""
    return ids[ids.index(end) + 1 :] if end in ids else ids
