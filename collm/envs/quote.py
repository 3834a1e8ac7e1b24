"""`quote`: writers divide a text that all of them read between them. Any chat model can play it without training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.data import field, split_rows
from collm.envs.quote_texts import texts
from collm.envs.wording import Texts, Wording, texts_of
from collm.envs.writing.lexicon import STOP_WORDS, words
from collm.errors import EnvError

ORDINALS = ("first", "second", "third", "fourth")
FIELDS = ("post", "prompt", "text")


class Quote(TextEnv):
    """Two to four writers each repeat part of a text, without seeing each other's answers.

    The content words are the distinct words of the text's first `length` words, without stop words. Only the first `max_words`
    words of an answer count, so that no answer can repeat the whole text. Let C be the fraction of the content words that at
    least one writer has written so far. Team reward per turn: the increase of C ("dense"), or C in the last turn and 0 before
    ("sparse"). Both sum to C of the last turn. Ends after `turns` turns.
    Perfect play returns 1. Two writers who both repeat the beginning return about one half.

    Metrics over all turns so far: covered (C); share_first, share_second, ... (fraction of the content words that this writer
    has written); both (fraction that at least two writers have written); position_first, ... (mean position in the text of the
    words that this writer has written: 0 the beginning, 1 the end, 0.5 if it has written none). Metrics of the turn: foreign
    (counted words that are not in the text); rejected (answers without a word of the text).

    Args:
        agents: how many writers, or their names.
        length: how many words of a text are shown; shorter texts are left out.
        max_words: how many words of an answer count.
        turns: how many turns an episode has.
        reward: "dense" or "sparse".
        view: what a writer reads after a turn: the words covered so far by all writers ("all") or by itself ("own").
        data, eval_data: JSON rows with a field post, prompt or text, as in tldr; default: built-in texts.
        wording: "plain" or "terse"; the two are the same here.
        split: "train" or "eval".
    """

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        length: int = 20,
        max_words: int = 12,
        turns: int = 1,
        reward: Literal["dense", "sparse"] = "dense",
        view: Literal["all", "own"] = "all",
        data: str | None = None,
        eval_data: str | None = None,
        wording: Wording = "plain",
        split: str = "train",
    ):
        count = agents if isinstance(agents, int) else len(agents)
        if not 2 <= count <= len(ORDINALS):
            raise EnvError(f"agents={agents!r}: quote is played by 2 to {len(ORDINALS)} writers.")
        super().__init__(agent_names(list(ORDINALS[:count]) if isinstance(agents, int) else agents, "writer"), turns)
        for name, value, allowed in (
            ("reward", reward, ("dense", "sparse")),
            ("view", view, ("all", "own")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        if not 1 <= max_words < length:
            raise EnvError(f"max_words={max_words} with length={length}: take 1 to length - 1, so that no answer repeats all.")
        if data is None and eval_data is not None:
            raise EnvError(f"eval_data={eval_data!r} comes without data: give data=... to train on as well.")
        self.texts = _read(data, eval_data, split, length)
        self.num_tasks = len(self.texts)
        self.max_words, self.reward, self.view = max_words, reward, view
        self.wording = texts_of(wording, TEXTS, TEXTS)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.text = self.texts[task]
        self.words = words(self.text)
        self.content = set(self.words) - STOP_WORDS
        self.written: dict[str, set[str]] = {agent: set() for agent in self.agents}
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        before, foreign, rejected = self.covered(), 0, 0
        for agent, answer in answers.items():
            counted = words(answer)[: self.max_words]
            known = [word for word in counted if word in self.words]
            self.written[agent] |= set(known) & self.content
            foreign += len(counted) - len(known)
            rejected += not known
        covered = self.covered()
        if self.reward == "dense":
            reward = self._share(covered) - self._share(before)
        else:
            reward = self._share(covered) if self.last_turn else 0.0
        twice = {word for word in covered if sum(word in own for own in self.written.values()) > 1}
        metrics = {"covered": self._share(covered), "both": self._share(twice)}
        for ordinal, own in zip(ORDINALS, self.written.values(), strict=False):
            metrics |= {f"share_{ordinal}": self._share(own), f"position_{ordinal}": self._position(own)}
        metrics |= {"foreign": float(foreign), "rejected": float(rejected)}
        observations = {agent: self.wording.later(self, agent) for agent in answers}
        return Outcome(reward, {"covered": reward}, observations, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """Each writer repeats another part; the parts follow each other over writers and turns and cover the text."""
        told = self.text.split()
        size = -(-len(told) // max(len(self.agents), -(-len(told) // self.max_words)))
        parts = [" ".join(told[start : start + size]) for start in range(0, len(told), size)]
        first = self.turn * len(self.agents)
        return {agent: parts[(first + index) % len(parts)] for index, agent in enumerate(self.agents)}

    def num_parts(self, answer: str) -> int:
        return 1

    def state(self) -> str:
        covered = self.covered()
        return f"turn {self.turn} of {self.turns}\ncovered {len(covered)} of {len(self.content)}: {self.listed(covered)}"

    def covered(self) -> set[str]:
        return set().union(*self.written.values())

    def _share(self, found: set[str]) -> float:
        return len(found) / len(self.content)

    def _position(self, found: set[str]) -> float:
        return sum(map(self.words.index, found)) / (len(found) * (len(self.words) - 1)) if found else 0.5

    def listed(self, found: set[str]) -> str:
        """Words of the text in its order, or "nothing"."""
        return " ".join(sorted(found, key=self.words.index)) or "nothing"


def _first(env: Quote, agent: str) -> str:
    ordinal = ORDINALS[env.possible_agents.index(agent)]
    return f"{env.text}\n\nYou are the {ordinal} writer. Repeat part of this text."


def _later(env: Quote, agent: str) -> str:
    if env.view == "own":
        said = f"You have covered: {env.listed(env.written[agent])}"
    else:
        said = f"All writers together have covered: {env.listed(env.covered())}"
    return f"{said}.\nRepeat another part of the text."


TEXTS = Texts(_first, _later)


def _read(data: str | None, eval_data: str | None, split: str, length: int) -> list[str]:
    """The first `length` words of every text that has as many. Texts of one word or without a content word are left out."""
    rows = [] if data is None else split_rows(data, eval_data, split)
    whole = list(texts(split)) if data is None else [field(row, FIELDS, data) for row in rows]
    cut = [" ".join(text.split()[:length]) for text in whole if len(text.split()) >= length]
    kept = [text for text in cut if len(words(text)) > 1 and set(words(text)) - STOP_WORDS]
    if not kept:
        longest = max(len(text.split()) for text in whole)
        raise EnvError(f"length={length}: no text of the split {split!r} has as many words, the longest {longest}; take fewer.")
    return kept
