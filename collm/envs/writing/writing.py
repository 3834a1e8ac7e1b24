"""`tldr` and `arxiv`: writers who do not see each other's text, rewarded for how well their texts fit together.

Both environments compute the same gates with different numbers: see `Rules`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.data import Row, field, split_rows
from collm.envs.wording import Wording, texts_of
from collm.envs.writing.lexicon import STOP_WORDS, Matching, jaccard, transition_categories, words
from collm.envs.writing.samples import Kind, sample_texts
from collm.envs.writing.script import chain
from collm.envs.writing.writing_wording import MARKER, PLAIN, TERSE
from collm.errors import EnvError

TOKEN_POINTS, LENGTH_POINTS, DISTINCT_POINTS, TRANSITION_POINTS, OVERLAP_POINTS = 0.5, 1.0, 0.5, 0.4, 0.6


@dataclass(frozen=True, slots=True)
class Band:
    """A gate on a ratio: full points from `full` to `full_end`, falling linearly to 0 at `low` and at `high`.

    All bounds are inclusive. Example: Band(1.1, 1.6, 3.2, 5.0).share(1.35) == 0.5 and .share(1.0) is None: the gate fails.
    """

    low: float
    full: float
    full_end: float = math.inf
    high: float = math.inf

    def share(self, ratio: float) -> float | None:
        """Fraction of the points, 0 to 1; None outside the band."""
        if not self.low <= ratio <= self.high:
            return None
        if ratio < self.full:
            return (ratio - self.low) / (self.full - self.low)
        return (self.high - ratio) / (self.high - self.full_end) if ratio > self.full_end else 1.0


@dataclass(frozen=True, slots=True)
class Rules:
    """The constants of one writing environment.

    kind: the kind of source text. fields: data-set columns that may hold it. source_tokens: smallest and largest length of a
    source text of a data set. roles: (name, description of its text), in order. tokens: smallest and largest number of
    whitespace tokens of each written text. length, distinct: gates on the ratio of the next text's characters, and of its
    distinct words, to this text's. overlap: the Jaccard index that earns full points. transitions_in_both: whether transition
    words count in both texts or in the second only. hint: the gates in words, as agents read them.
    """

    kind: Kind
    fields: tuple[str, ...]
    source_tokens: tuple[float, float]
    roles: tuple[tuple[str, str], ...]
    tokens: tuple[int, int]
    length: Band
    distinct: Band
    overlap: float
    transitions_in_both: bool
    hint: str


TLDR = Rules(
    kind="post",
    fields=("prompt", "post", "text"),
    source_tokens=(1, math.inf),
    roles=(
        ("concise", "a short summary"),
        ("detailed", "a longer summary"),
        ("extended", "a full account"),
        ("complete", "a full account with all details"),
    ),
    tokens=(8, 256),
    length=Band(1.1, 1.6, 3.2, 5.0),
    distinct=Band(1.3, 2.0),
    overlap=0.03,
    transitions_in_both=False,
    hint="1.6 to 3.2 times as long, with 2 times as many different words",
)
ARXIV = Rules(
    kind="abstract",
    fields=("abstract_text", "abstract", "text"),
    source_tokens=(100, 300),
    roles=(
        ("background", "background and motivation"),
        ("method", "method and implications"),
        ("results", "results and evidence"),
        ("outlook", "limits and open questions"),
    ),
    tokens=(128, 256),
    length=Band(0.8, 1.3, 1.6, 2.0),
    distinct=Band(0.5, 0.7, 1.3, 1.7),
    overlap=0.23,
    transitions_in_both=True,
    hint="1.3 to 1.6 times as long, with about as many different words",
)


def judge(rules: Rules, first: str, second: str, matching: Matching = "word") -> tuple[dict[str, float], dict[str, float]]:
    """(reward parts, measures) of two consecutive texts. A failed gate ends the sum; all measures are computed in any case.

    A ratio whose denominator is zero is 0 and fails its gate.
    """
    low, high = rules.tokens
    first_words, second_words = set(words(first)), set(words(second))
    first_length = len(first.strip())
    length_ratio = len(second.strip()) / first_length if first_length else 0.0
    distinct_ratio = len(second_words) / len(first_words) if first_words else 0.0
    shared = jaccard(first_words, second_words)
    joining = transition_categories(f"{first}\n{second}" if rules.transitions_in_both else second, matching)
    measures = {
        "length_ratio": length_ratio,
        "distinct_ratio": distinct_ratio,
        "jaccard": shared,
        "transitions": float(len(joining)),
        "gates": 0.0,
    }
    parts = dict.fromkeys(("tokens", "length", "distinct", "transitions", "overlap"), 0.0)
    if not all(low <= num_tokens(text) <= high for text in (first, second)):
        return parts, measures
    parts["tokens"], measures["gates"] = TOKEN_POINTS, 1.0
    share = rules.length.share(length_ratio)
    if share is None:
        return parts, measures
    parts["length"], measures["gates"] = LENGTH_POINTS * share, 2.0
    share = rules.distinct.share(distinct_ratio)
    if share is None:
        return parts, measures
    parts["distinct"], measures["gates"] = DISTINCT_POINTS * share, 3.0
    parts["transitions"] = TRANSITION_POINTS * (0.35 + 0.05 * len(joining) if joining else 0.0)
    parts["overlap"] = OVERLAP_POINTS * min(shared, rules.overlap) / rules.overlap
    return parts, measures


DIAGNOSTICS = ("source_overlap", "repetition", "source_words")
GRAM = 4


def diagnose(source: str, texts: Sequence[str]) -> dict[str, float]:
    """Measures of degenerate texts that the "paper" reward does not contain, each from 0 to 1, of the worst text.

    source_overlap: fraction of a text's 4-grams of words that are also in the source; 1 for a copy.
    repetition: 1 - distinct / all 4-grams of a text; near 1 for a sentence that is repeated many times.
    source_words: fraction of a text's distinct words, without stop words, that are in the source; near 0 for a text that is
    unrelated to the source, such as a constant one.
    A text that is too short for a measure has 0, 0 and 1.
    """
    source_words = words(source)
    source_grams, source_set = set(_grams(source_words)), set(source_words)
    found: dict[str, list[float]] = {name: [] for name in DIAGNOSTICS}
    for text in texts:
        written = words(text)
        grams, content = _grams(written), set(written) - STOP_WORDS
        found["source_overlap"].append(sum(gram in source_grams for gram in grams) / max(1, len(grams)))
        found["repetition"].append(1 - len(set(grams)) / len(grams) if grams else 0.0)
        found["source_words"].append(len(content & source_set) / len(content) if content else 1.0)
    worst = {"source_overlap": max, "repetition": max, "source_words": min}
    return {name: float(worst[name](values)) for name, values in found.items()}


def charge(measures: Mapping[str, float]) -> float:
    """Fraction of the reward that reward="guarded" subtracts: the maximum of three terms, each rising linearly from 0 to 1.

    The terms rise with source_overlap from 0.5 to 1, with repetition from 0.2 to 0.6, and with source_words from 0.2 down to 0.
    """
    overlap = (measures["source_overlap"] - 0.5) / 0.5
    repetition = (measures["repetition"] - 0.2) / 0.4
    foreign = (0.2 - measures["source_words"]) / 0.2
    return min(1.0, max(0.0, overlap, repetition, foreign))


def _grams(written: Sequence[str]) -> list[tuple[str, ...]]:
    return [tuple(written[i : i + GRAM]) for i in range(len(written) - GRAM + 1)]


def cut(answer: str, missing_marker: Literal["first", "third"] = "first") -> tuple[str, str]:
    """The two texts in one answer: before and after the first marker.

    Without a marker the answer is the first text and the second is empty; with "third" the answer is cut at one third of its
    characters.
    """
    if MARKER not in answer and missing_marker == "third":
        return answer[: len(answer) // 3], answer[len(answer) // 3 :]
    first, _, second = answer.partition(MARKER)
    return first, second


class Writing(TextEnv):
    """The common base of `tldr` and `arxiv`; `rules` holds their constants."""

    rules: ClassVar[Rules]
    max_reward = 3.0
    diagnostics = frozenset(DIAGNOSTICS)

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        data: str | None = None,
        eval_data: str | None = None,
        transitions: Matching = "word",
        missing_marker: Literal["first", "third"] = "first",
        reward: Literal["paper", "guarded"] = "paper",
        wording: Wording = "plain",
        split: str = "train",
    ):
        names = [name for name, _ in self.rules.roles]
        if (agents if isinstance(agents, int) else len(agents)) > len(names):
            raise EnvError(f"agents={agents!r}: there are {len(names)} roles ({', '.join(names)}); take at most that many.")
        if isinstance(agents, int) and agents > 0:
            agents = names[:agents] if agents > 1 else ["writer"]
        super().__init__(agent_names(agents, "writer"), 1)
        for name, value, allowed in (
            ("transitions", transitions, ("word", "substring")),
            ("missing_marker", missing_marker, ("first", "third")),
            ("reward", reward, ("paper", "guarded")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        if missing_marker == "third" and len(self.possible_agents) > 1:
            raise EnvError(f"missing_marker='third' applies to one agent that writes both texts; set agents=1, not {agents!r}.")
        if data is None and eval_data is not None:
            raise EnvError(f"eval_data={eval_data!r} comes without data: give data=... to train on as well.")
        self.texts, self.skipped = _read(self.rules, data, eval_data, split)
        self.num_tasks = len(self.texts)
        self.alone = len(self.possible_agents) == 1
        self.roles = names[:2] if self.alone else list(self.possible_agents)
        self.transitions, self.missing_marker, self.reward = transitions, missing_marker, reward
        self.wording = texts_of(wording, PLAIN, TERSE)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.text = self.texts[task]
        self.measures: dict[str, float] = {}
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        written = list(answers.values())
        texts = list(cut(written[0], self.missing_marker)) if self.alone else written
        judged = [judge(self.rules, first, second, self.transitions) for first, second in pairwise(texts)]
        parts, measures = (_mean([pair[index] for pair in judged]) for index in (0, 1))
        counts = [num_tokens(text) for text in texts]
        low, high = self.rules.tokens
        metrics = {f"tokens_{role}": float(count) for role, count in zip(self.roles, counts, strict=True)}
        metrics |= measures | {"rejected": float(sum(not low <= count <= high for count in counts))}
        if self.alone:
            metrics["delimiter_adherence"] = float(written[0].count(MARKER) == 1)
        self.measures = dict(metrics)  # without the diagnostics, which critics do not read
        metrics |= diagnose(self.text, texts)
        if self.reward == "guarded":
            parts["guard"] = -charge(metrics) * sum(parts.values())
        total = sum(parts.values())
        return Outcome(total, parts, {agent: self.wording.later(self, agent, total) for agent in answers}, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """Each text retells the source and is longer than the text before it, with transition words in between."""
        rules, (low, high) = self.rules, self.rules.tokens
        texts = chain(self.text, len(self.roles), (max(16, low + 2), high - 6), rules.length.full, rules.distinct.full)
        return {self.agents[0]: f"\n{MARKER}\n".join(texts)} if self.alone else dict(zip(self.agents, texts, strict=True))

    def num_parts(self, answer: str) -> int:
        return 1

    def state(self) -> str:
        """The length of the source text; after the answers also their measures."""
        lines = [f"{self.rules.kind} of {num_tokens(self.text)} words, {len(set(words(self.text)))} different"]
        return "\n".join(lines + [f"{name}: {value:.2f}" for name, value in self.measures.items()])


class Tldr(Writing):
    """Agents write a short and a longer summary of a Reddit post without seeing each other's text.

    The raw reward is a sum that the first failed gate ends (all bounds inclusive):

    1. both texts have 8 to 256 whitespace tokens: +0.5, else the reward is 0;
    2. ratio of the characters of `detailed` to those of `concise` (stripped): +1 from 1.6 to 3.2, linear to 0 at 1.1 and at 5;
    3. ratio of distinct lower-cased words: +0.5 from 2, linear to 0 at 1.3;
    4. 0.4 * T + 0.6 * min(J, 0.03) / 0.03. J is the Jaccard index of the two word sets without stop words; T is 0 without a
       transition word in `detailed`, else 0.4 for the first of the twelve categories and 0.05 for each further one.

    An episode is one turn. Perfect play earns 2.98: `concise` repeats some ten words of the post, `detailed` has twice as many
    distinct words and a transition word of every category. Scores are percentages of 3, as in the paper.
    With three or four agents consecutive texts are compared: each text is the `detailed` of the text before it; reward and
    measures are means over these pairs. A single agent writes both texts with [PARAGRAPH_SPLIT] between them.
    Metrics: tokens_ROLE of each text, length_ratio, distinct_ratio, jaccard, transitions (number of categories), gates (number
    passed, 0 to 3), rejected (texts outside 8 to 256 tokens), and with one agent delimiter_adherence (1 if the answer has
    exactly one marker). Diagnostics, which critics do not read, of the worst text: source_overlap (fraction of its 4-grams of
    words that are in the source), repetition (fraction of its 4-grams that are repeats) and source_words (fraction of its
    distinct words, without stop words, that are in the source).

    Args:
        agents: how many writers (1 to 4), or their names in the order of the roles.
        data: posts: rows with `prompt` (trl-lib/tldr: "hf:trl-lib/tldr:train[:1100]"), `post` or `text`; a closing "TL;DR:" is
            removed, and empty posts are skipped. Without `eval_data` the last fifth is held out. Default: built-in posts.
        eval_data: the held-out posts, for example "hf:trl-lib/tldr:test[:1100]".
        transitions: "word" matches whole words; "substring" matches anywhere ("so" in "some"), as the reference does.
        missing_marker: how a single agent's answer without a marker is read: "first" takes it as the first text; "third" cuts
            it at one third of its characters, as the reference does, which passes the length gate by construction.
        reward: "paper" as above; "guarded" subtracts a fraction of it, as part `guard`, for texts that copy the source, repeat
            themselves or are unrelated to the source: see `charge`.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval".
    """

    rules = TLDR


class Arxiv(Writing):
    """Agents write background and method of a paper from its abstract without seeing each other's text.

    The raw reward is a sum that the first failed gate ends (all bounds inclusive):

    1. both texts have 128 to 256 whitespace tokens: +0.5, else the reward is 0;
    2. ratio of the characters of `method` to those of `background` (stripped): +1 from 1.3 to 1.6, linear to 0 at 0.8 and at 2;
    3. ratio of distinct lower-cased words: +0.5 from 0.7 to 1.3, linear to 0 at 0.5 and at 1.7;
    4. 0.4 * T + 0.6 * min(J, 0.23) / 0.23. J is the Jaccard index of the two word sets without stop words; T is 0 without a
       transition word in the two texts joined by a line end, else 0.4 for the first of the twelve categories and 0.05 for each
       further one.

    An episode is one turn. Perfect play earns 2.98: both texts retell the abstract in similar words, `method` has 1.3 to 1.6
    times as many characters, and together they have a transition word of every category. Scores are percentages of 3, as in
    the paper. With three or four agents consecutive texts are compared; reward and measures are means over these pairs. A
    single agent writes both texts with [PARAGRAPH_SPLIT] between them. Metrics: as in `Tldr`.

    Args:
        agents: how many writers (1 to 4), or their names in the order of the roles.
        data: abstracts: rows with `abstract_text` (OpenMLRL/arXiv_abstract: "hf:OpenMLRL/arXiv_abstract:train[:1100]"),
            `abstract` or `text`. Abstracts outside 100 to 300 whitespace tokens are skipped and counted in the attribute
            `skipped`. Without `eval_data` the last fifth is held out. Default: built-in abstracts.
        eval_data: the held-out abstracts, for example "hf:OpenMLRL/arXiv_abstract:val[:1100]".
        transitions: "word" matches whole words; "substring" matches anywhere ("so" in "some"), as the reference does.
        missing_marker: how a single agent's answer without a marker is read: "first" takes it as the first text; "third" cuts
            it at one third of its characters, as the reference does, which passes the length gate by construction.
        reward: "paper" as above; "guarded" subtracts a fraction of it, as part `guard`, for texts that copy the source, repeat
            themselves or are unrelated to the source: see `charge`.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval".
    """

    rules = ARXIV


Texts = tuple[Sequence[str], int]
"""(texts of one split, how many rows were skipped for their length)."""

_KEPT: dict[tuple[Rules, str, str | None, str], tuple[list[Row], Texts]] = {}
"""The texts read from rows, cached since environments are made anew for every episode."""


def _read(rules: Rules, data: str | None, eval_data: str | None, split: str) -> Texts:
    if data is None:
        return sample_texts(rules.kind, split), 0
    rows = split_rows(data, eval_data, split)
    kept_rows, kept = _KEPT.get((rules, data, eval_data, split), ([], ([], 0)))
    if len(rows) == len(kept_rows) and all(rows[end] is kept_rows[end] for end in (0, -1)):  # a changed file gives new rows
        return kept
    source = eval_data if split == "eval" and eval_data is not None else data
    low, high = rules.source_tokens
    texts = [text for row in rows if low <= num_tokens(text := _shown(field(row, rules.fields, source))) <= high]
    if not texts:
        raise EnvError(f"data={source!r}: none of its {len(rows)} rows has {low} to {high} words; give other rows.")
    _KEPT[rules, data, eval_data, split] = rows, (texts, len(rows) - len(texts))
    return texts, len(rows) - len(texts)


def _shown(text: str) -> str:
    """A post without the "TL;DR:" that ends it in trl-lib/tldr."""
    return text.strip().removesuffix("TL;DR:").rstrip()


def num_tokens(text: str) -> int:
    """Number of whitespace tokens."""
    return len(text.split())


def _mean(records: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(record[name] for record in records) / len(records) for name in records[0]}
