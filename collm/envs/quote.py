"""`quote`: writers share out a text that each of them sees, without seeing each other; any chat model can play it untrained."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.data import field, split_rows
from collm.envs.quote_texts import texts
from collm.envs.writing.lexicon import STOP_WORDS, words
from collm.errors import EnvError

ORDINALS = ("first", "second", "third", "fourth")
FIELDS = ("post", "prompt", "text")


class Quote(TextEnv):
    """Two to four writers each repeat part of a text, without seeing each other's answers.

    Content words are the different words of the text's first `length` words, without stop words. An answer counts up to its
    first `max_words` words, so that no answer can repeat the whole text. With C the share of the content words that at least
    one writer has written by now, a turn's reward is the increase of C ("dense"), or 0 before the last turn and C at the last
    ("sparse"). Both sum to C of the last turn. Ends after `turns` turns; the optimum is 1. Two writers who both repeat the
    beginning earn about one half.

    Metrics, over all turns so far: covered (C); share_first, share_second, ... (share of the content words that this writer
    has written); both (share that at least two writers have written); position_first, ... (mean position in the text of what
    this writer has written, 0 its begin, 1 its end, 0.5 if nothing). Of the turn: foreign (counted words that the text does not
    have); rejected (answers without a word of the text).

    Args:
        agents: how many writers, or their names.
        length: how many words of a text they see; shorter texts are left out.
        max_words: how many words of an answer count.
        turns: how often they write.
        reward: "dense" or "sparse".
        view: what they read after a turn: the words that all ("all") or they themselves ("own") have covered by now.
        data, eval_data: JSON rows with a field post, prompt or text, as in tldr; built-in texts without.
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

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.text = self.texts[task]
        self.words = words(self.text)
        self.content = set(self.words) - STOP_WORDS
        self.written: dict[str, set[str]] = {agent: set() for agent in self.agents}
        return {
            agent: f"{self.text}\n\nYou are the {ordinal} writer. Repeat part of this text."
            for agent, ordinal in zip(self.agents, ORDINALS, strict=False)
        }

    def play(self, answers: dict[str, str]) -> Outcome:
        before, foreign, rejected = self._covered(), 0, 0
        for agent, answer in answers.items():
            counted = words(answer)[: self.max_words]
            known = [word for word in counted if word in self.words]
            self.written[agent] |= set(known) & self.content
            foreign += len(counted) - len(known)
            rejected += not known
        covered = self._covered()
        if self.reward == "dense":
            reward = self._share(covered) - self._share(before)
        else:
            reward = self._share(covered) if self.last_turn else 0.0
        twice = {word for word in covered if sum(word in own for own in self.written.values()) > 1}
        metrics = {"covered": self._share(covered), "both": self._share(twice)}
        for ordinal, own in zip(ORDINALS, self.written.values(), strict=False):
            metrics |= {f"share_{ordinal}": self._share(own), f"position_{ordinal}": self._position(own)}
        metrics |= {"foreign": float(foreign), "rejected": float(rejected)}
        return Outcome(reward, {"covered": reward}, {agent: self._feedback(agent) for agent in answers}, metrics=metrics)

    def state(self) -> str:
        covered = self._covered()
        return f"turn {self.turn} of {self.turns}\ncovered {len(covered)} of {len(self.content)}: {self._listed(covered)}"

    def _covered(self) -> set[str]:
        return set().union(*self.written.values())

    def _share(self, found: set[str]) -> float:
        return len(found) / len(self.content)

    def _position(self, found: set[str]) -> float:
        return sum(map(self.words.index, found)) / (len(found) * (len(self.words) - 1)) if found else 0.5

    def _feedback(self, agent: str) -> str:
        if self.view == "own":
            said = f"You have covered: {self._listed(self.written[agent])}"
        else:
            said = f"All writers together have covered: {self._listed(self._covered())}"
        return f"{said}.\nRepeat another part of the text."

    def _listed(self, found: set[str]) -> str:
        return " ".join(sorted(found, key=self.words.index)) or "nothing"


def _read(data: str | None, eval_data: str | None, split: str, length: int) -> list[str]:
    """The first `length` words of every text that has as many, with at least one content word among several words."""
    rows = [] if data is None else split_rows(data, eval_data, split)
    whole = list(texts(split)) if data is None else [field(row, FIELDS, data) for row in rows]
    cut = [" ".join(text.split()[:length]) for text in whole if len(text.split()) >= length]
    kept = [text for text in cut if len(words(text)) > 1 and set(words(text)) - STOP_WORDS]
    if not kept:
        longest = max(len(text.split()) for text in whole)
        raise EnvError(f"length={length}: no text of the split {split!r} has as many words, the longest {longest}; take fewer.")
    return kept
