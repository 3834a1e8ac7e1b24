"""The records that pass between rooms: Message, Sampling, Request, Completion, Turn, Episode, Group.

Worked example: two agents play one turn of the environment `agree`.

    Request("agent_0", (Message("user", "Name one colour ..."),), sampling=Sampling(max_tokens=4), seed=7)
      -> Completion("agent_0", text="red", prompt_ids=[5, 9, ...], token_ids=[71, 2], logprobs=[-1.39, -0.01])
    Turn(observations={"agent_0": "Name one ...", "agent_1": ...}, completions={...}, reward=1.0, ...)
    Episode(task=0, seed=3, agents=("agent_0", "agent_1"), turns=[...], terminated=True)
    Group(task=0, episodes=[four episodes of task 0])
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int32]
Metrics = dict[str, float]
History = Literal["full", "last", "newest"]


def encodable(text: str) -> str:
    """The text with every lone surrogate (which JSON allows and UTF-8 does not) replaced by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Untrusted text, made safe for a terminal: control characters (which begin escape sequences), direction marks and other
    unprintable characters become "?"; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "?" for c in text)


THOUGHT, THOUGHT_END = "<think>", "</think>"
"""The marks that models put around their thoughts."""


def without_thoughts(text: str) -> str:
    """The text after the last thought; empty if a thought has no end. Example: "<think>\\nA?\\n</think>\\n\\nred" -> "red"."""
    _, end, answer = text.rpartition(THOUGHT_END)
    return "" if THOUGHT in answer else answer.lstrip("\n") if end else answer


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a chat. Example: Message("assistant", "red", token_ids=array([71, 2]))"""

    role: Literal["system", "user", "assistant"]
    text: str
    token_ids: Ids | None = None
    """(L,) sampled token ids of an answer, so that it is never re-tokenized; end-of-text included where it was sampled. None
    for a text that was not sampled."""


@dataclass(frozen=True, slots=True)
class Example:
    """A worked example: a chat that an agent reads before its history. It is never trained on.

    Example: Example((Message("user", "Name one colour ..."), Message("assistant", "red")), agent="agent_0", task=3)
    """

    messages: tuple[Message, ...]
    """Observations and answers in turn, ending with an answer."""
    agent: str | None = None
    """The agent that reads it; None: every agent."""
    task: int | None = None
    """The training task that it was drawn from, if known."""


def examples_of(examples: Iterable[Example], agent: str) -> tuple[Message, ...]:
    """The messages of an agent's examples, in order."""
    return tuple(message for example in examples if example.agent in (None, agent) for message in example.messages)


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution that an answer is sampled from. Example: Sampling(temperature=0.7, top_p=0.95, max_tokens=64)"""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; 1 keeps all."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    max_tokens: int = 256
    """Maximum length of an answer, in tokens, end-of-text included."""

    def distribution(self) -> dict[str, Any]:
        """Temperature, top-p and top-k as keyword arguments of the functions in `algorithms.logprobs`."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True, slots=True)
class Request:
    """One agent's history, to be answered by an engine."""

    agent: str
    messages: tuple[Message, ...]
    """The agent's own history; the last message is the one to answer."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Determines the random numbers of this answer, whatever else is in the batch."""
    kind: Literal["answer", "message"] = "answer"
    """"answer": the action for the environment. "message": text for the other agents, written before they answer."""


@dataclass(frozen=True, slots=True)
class Completion:
    """An engine's answer to a request.

    The arrays are None if the engine cannot return them; such answers are for evaluation and not for training.
    Example: Completion("agent_0", "red", array([5, 9]), array([71, 2]), array([-1.39, -0.01]))
    """

    agent: str
    text: str
    """The answer for the environment and the team-mates: decoded, without special tokens, and without thoughts unless
    team.thinking = "shown"."""
    prompt_ids: Ids | None = None
    """(P,) token ids that the model read."""
    token_ids: Ids | None = None
    """(L,) sampled token ids, end-of-text included where it was sampled."""
    logprobs: NDArray[np.float32] | None = None
    """(L,) natural log-probs under the distribution that was sampled from (temperature, top-p, top-k applied)."""
    finish_reason: Literal["stop", "length", "error"] = "stop"
    """"stop": end-of-text was sampled. "length": max_tokens was reached. "error": no answer was generated."""
    error: str = ""
    """The reason, for finish_reason "error"."""
    written: str | None = None
    """All that the model wrote, thoughts included, if `text` is less; else None."""


def outcome(
    acted: Iterable[str], rewards: Mapping[str, float], infos: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float, Mapping[str, Any]]:
    """(joint reward, raw joint reward, info) of one `env.step`.

    The joint reward is the mean over the agents that acted; the raw one is without the environment's shift; info is that of
    the first acting agent that has one.
    """
    acted = list(acted)
    info: Mapping[str, Any] = next((infos[agent] for agent in acted if infos.get(agent)), {})
    reward = float(sum(rewards[agent] for agent in acted)) / len(acted)
    return reward, float(info.get("raw_reward", reward)), info


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The outcome of a no-op counterfactual: a turn replayed with one agent's answer empty.

    Example: Counterfactual(reward=0.0, raw_reward=0.0, metrics={"match": 0.0})
    """

    reward: float
    """Joint reward of the replayed turn, shift included."""
    raw_reward: float
    """Joint reward of the replayed turn, without shift."""
    metrics: dict[str, float]
    """Environment metrics after the replayed turn."""
    observations: dict[str, str] = field(default_factory=dict)
    """Agent -> its observation after the replayed turn."""
    matches: bool = True
    """Whether the replay repeated what was recorded before the turn: observations, metrics and rewards."""


@dataclass(slots=True)
class Turn:
    """One `env.step` by all agents.

    Example: Turn({"a": "Name ..."}, {"a": Completion(...)}, reward=1.0, raw_reward=1.0, parts={"match": 1.0})
    """

    observations: dict[str, str]
    """Agent -> the observation that it answered."""
    completions: dict[str, Completion]
    """Agent -> its answer; agents that did not act are absent."""
    reward: float
    """Joint reward after the turn, shift included."""
    raw_reward: float
    """Joint reward after the turn, without shift."""
    parts: dict[str, float] = field(default_factory=dict)
    """Name -> part of the raw reward."""
    state: str = ""
    """The privileged view before the turn, which critics alone may read."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Environment metrics before the turn; empty before the first turn."""
    messages: dict[str, Completion] = field(default_factory=dict)
    """Agent -> its message to the others before the answers, under the protocol `discussion`."""
    alternatives: dict[str, list[Completion]] = field(default_factory=dict)
    """Agent -> K answers resampled from the same history, for counterfactual baselines."""
    no_op: dict[str, Counterfactual] = field(default_factory=dict)
    """Agent -> outcome of the turn with that agent's answer empty, for difference baselines; absent where the replay failed."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """The learner's numbers for one answer, recorded beside the episode. Example: Annotation(0.4, 0.6, 0.6)"""

    value: float | None = None
    """The critic's prediction before the update, in units of return; None without a critic."""
    td_error: float | None = None
    """r + gamma V' - V, in units of return; None unless the critic predicts V."""
    advantage: float | None = None
    """The advantage that the answer was trained with, after normalization."""


@dataclass(slots=True)
class Episode:
    """One play of a task, from reset to end.

    Example: Episode(task=0, seed=3, agents=("a", "b"), turns=[Turn(...)], terminated=True, metrics={"match": 1.0})
    """

    task: int
    """The task's number, passed to `reset(options={"task": ...})`."""
    seed: int
    """Seed of the environment's randomness; the episodes of a group share it."""
    agents: tuple[str, ...]
    """All agents of the environment, frozen team-mates included."""
    observations: dict[str, str] = field(default_factory=dict)
    """Agent -> newest observation, not answered yet; a critic reads it as the final history of a truncated episode."""
    turns: list[Turn] = field(default_factory=list)
    """The T turns played, in order."""
    state: str = ""
    """The privileged view after the last turn."""
    terminated: bool = False
    """The environment ended the episode."""
    truncated: bool = False
    """The episode was cut off before its end; its return is bootstrapped with V of the final history."""
    failure: str = ""
    """The reason why the episode could not be completed, or empty. Failed episodes are recorded and counted, and are not
    trained on."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Environment metrics after the last turn."""
    sibling: int = 0
    """The episode's number within its group."""
    path: tuple[int, ...] = ()
    """In a turn tree: the child taken at each turn."""
    own_from: int = 0
    """In a turn tree: the first turn that is trained in this episode; earlier turns belong to a sibling."""
    seconds: float = 0.0
    """Wall-clock seconds from creation to end."""
    label: str = ""
    """The task's name."""
    examples: Mapping[str, tuple[Message, ...]] = field(default_factory=dict)
    """Agent -> worked examples that it reads before its history; they are not turns."""

    def history(self, agent: str, kind: History = "full") -> tuple[Message, ...]:
        """The observations and answers of `agent`, ending with the observation that it is to answer now.

        "full" is a growing chat. "last" keeps the first observation, the agent's last answer and the newest observation.
        "newest" is the newest observation alone, for environments that repeat everything relevant at every turn. The agent's
        examples come first in all three.
        """
        examples = self.examples.get(agent, ())
        messages: list[Message] = []
        for turn in self.turns:
            if agent in turn.completions:
                answer = turn.completions[agent]
                messages.append(Message("user", turn.observations[agent]))
                messages.append(Message("assistant", answer.text, answer.token_ids))
        messages.append(Message("user", self.observations[agent]))
        if kind == "newest":
            return (*examples, messages[-1])
        if kind == "last" and len(messages) > 3:
            messages = [messages[0], *messages[-2:]]
        return (*examples, *messages)

    def add(
        self,
        completions: list[Completion],
        observations: Mapping[str, Any],
        rewards: Mapping[str, float],
        terminations: Mapping[str, bool],
        truncations: Mapping[str, bool],
        infos: Mapping[str, Mapping[str, Any]],
        state: str = "",
        messages: Mapping[str, Completion] | None = None,
    ) -> None:
        """Record one turn from the engine's completions and the five dicts that `env.step` returned."""
        acted = [completion.agent for completion in completions]
        reward, raw_reward, info = outcome(acted, rewards, infos)
        self.turns.append(
            Turn(
                observations={agent: self.observations[agent] for agent in acted},
                completions={completion.agent: completion for completion in completions},
                reward=reward,
                raw_reward=raw_reward,
                parts=dict(info.get("reward_parts", {})),
                state=self.state,
                metrics=self.metrics,
                messages=dict(messages or {}),
            )
        )
        self.observations = {agent: str(text) for agent, text in observations.items()}
        self.state = state
        self.metrics = dict(info.get("metrics", self.metrics))
        self.terminated = all(terminations.get(agent, True) for agent in acted)
        self.truncated = not self.terminated and all(
            truncations.get(agent, False) or terminations.get(agent, True) for agent in acted
        )

    @property
    def score(self) -> float:
        """The raw reward of the last turn played, which evaluation and tables report; NaN without a turn."""
        return self.turns[-1].raw_reward if self.turns else float("nan")

    def num_tokens(self) -> int:
        """Number of tokens that all agents sampled in the episode's own turns, messages to each other included."""
        return sum(
            len(completion.token_ids)
            for turn in self.turns[self.own_from :]
            for completion in (*turn.messages.values(), *turn.completions.values())
            if completion.token_ids is not None
        )


@dataclass(slots=True)
class Group:
    """Episodes of one task that are compared. Example: Group(task=0, episodes=[Episode(...), Episode(...)])"""

    task: int
    episodes: list[Episode]
    """G siblings, or the leaves of one turn tree."""
