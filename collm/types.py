"""The records that pass between rooms: Message, Sampling, Request, Completion, Turn, Episode, Group.

One worked example runs through this file: two agents play one turn of `agree`.

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
    """Text that can be written as UTF-8: half a surrogate pair, which JSON allows, becomes U+FFFD; all else stays as it is."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """Text from elsewhere as a terminal may get it: control characters (escape sequences begin with one), marks that turn the
    direction of writing and the like become "?"; line breaks and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "?" for c in text)


@dataclass(frozen=True, slots=True)
class Message:
    """One text of a chat. `token_ids` holds what was sampled, so that an answer is never re-tokenized.

    Example: Message("assistant", "red", token_ids=array([71, 2])); the end-of-text token, where sampled, is included.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    token_ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution an answer is sampled from.

    temperature: divides the logits; 0 is greedy. top_p: keep the smallest set of tokens with this probability (1 keeps all).
    top_k: keep the k likeliest tokens (0 keeps all). max_tokens: the longest answer, in tokens, end-of-text included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256

    def distribution(self) -> dict[str, Any]:
        """Temperature and support, as the functions of `algorithms.logprobs` take them."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True, slots=True)
class Request:
    """One agent's own history, to be answered. `seed` alone decides the random numbers of this answer.

    kind: "answer" goes to the world; "message" goes to the other agents, before they answer.
    """

    agent: str
    messages: tuple[Message, ...]
    sampling: Sampling = Sampling()
    seed: int = 0
    kind: Literal["answer", "message"] = "answer"


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer.

    prompt_ids: (P,) tokens the model read; token_ids: (L,) tokens it sampled, end-of-text included; logprobs: (L,) natural
    log of each token's probability under the distribution it was sampled from (temperature and support included).
    The arrays are None when an engine cannot give them; such answers serve evaluation, never training.
    """

    agent: str
    text: str
    prompt_ids: Ids | None = None
    token_ids: Ids | None = None
    logprobs: NDArray[np.float32] | None = None
    finish_reason: Literal["stop", "length", "error"] = "stop"
    error: str = ""


def outcome(
    acted: Iterable[str], rewards: Mapping[str, float], infos: Mapping[str, Mapping[str, Any]]
) -> tuple[float, float, Mapping[str, Any]]:
    """Joint reward (the mean over those who acted), the same without shift, and the first agent's info of one `env.step`."""
    acted = list(acted)
    info: Mapping[str, Any] = next((infos[agent] for agent in acted if infos.get(agent)), {})
    reward = float(sum(rewards[agent] for agent in acted)) / len(acted)
    return reward, float(info.get("raw_reward", reward)), info


@dataclass(frozen=True, slots=True)
class Counterfactual:
    """The outcome of a turn that was replayed with one agent's answer empty (a no-op): joint reward, the same without shift,
    and the environment metrics after the turn.

    Example: Counterfactual(reward=0.0, raw_reward=0.0, metrics={"match": 0.0})
    """

    reward: float
    raw_reward: float
    metrics: dict[str, float]


@dataclass(slots=True)
class Turn:
    """One `env.step` by all agents.

    observations: what the world told each agent before it answered; reward: the joint reward, shift included; raw_reward:
    without it. parts: the named parts of the raw reward; state: the privileged view before the turn (read by critics only).
    metrics: the numbers by name that the world reported before the turn (none before the first).
    messages: what each agent wrote to the others before answering, under the protocol `discussion`.
    alternatives: for counterfactual baselines, other answers each agent could have given to the same history.
    no_op: for difference baselines, by agent, the outcome of the turn with that agent's answer empty.
    Example: Turn({"a": "Name ..."}, {"a": Completion(...)}, reward=1.0, raw_reward=1.0, parts={"match": 1.0})
    """

    observations: dict[str, str]
    completions: dict[str, Completion]
    reward: float
    raw_reward: float
    parts: dict[str, float] = field(default_factory=dict)
    state: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    messages: dict[str, Completion] = field(default_factory=dict)
    alternatives: dict[str, list[Completion]] = field(default_factory=dict)
    no_op: dict[str, Counterfactual] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Annotation:
    """What the learner says about one answer, for a person to read.

    value: what the agent's critic predicted before the update, in units of return; td_error: r + gamma V' - V, with V alone;
    advantage: what the answer was trained with. None where the algorithm has none. Example: Annotation(0.4, 0.6, 0.6)
    """

    value: float | None = None
    td_error: float | None = None
    advantage: float | None = None


@dataclass(slots=True)
class Episode:
    """Reset to end.

    terminated: the world ended it. truncated: the collector cut it; then `observations` holds what each agent would have
    read next, from which a critic judges the rest. failure: why it could not be played to its end; such an episode is
    recorded and counted, never trained on.
    seed: of the world's randomness, shared by a group; `sibling` tells the group's members apart. label: the task's name.
    path: in a turn tree, the child taken at each turn; turns before `own_from` belong to a sibling and are not trained here.
    Example: Episode(task=0, seed=3, agents=("a", "b"), turns=[Turn(...)], terminated=True, metrics={"match": 1.0})
    """

    task: int
    seed: int
    agents: tuple[str, ...]
    observations: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    state: str = ""
    terminated: bool = False
    truncated: bool = False
    failure: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    sibling: int = 0
    path: tuple[int, ...] = ()
    own_from: int = 0
    seconds: float = 0.0
    label: str = ""

    def history(self, agent: str, kind: History = "full") -> tuple[Message, ...]:
        """All that the world told `agent` and that it answered, ending with what it is to answer now.

        "full" is a growing chat. "last" keeps the first instruction, the agent's last answer and the newest observation.
        "newest" is the newest observation alone, for worlds that say all that matters at every turn.
        """
        messages: list[Message] = []
        for turn in self.turns:
            if agent in turn.completions:
                answer = turn.completions[agent]
                messages.append(Message("user", turn.observations[agent]))
                messages.append(Message("assistant", answer.text, answer.token_ids))
        messages.append(Message("user", self.observations[agent]))
        if kind == "newest":
            return (messages[-1],)
        if kind == "last" and len(messages) > 3:
            messages = [messages[0], *messages[-2:]]
        return tuple(messages)

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
        """Record one turn from what the engine and `env.step` returned. The joint reward is the mean over agents."""
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
        """The raw reward of the last turn played: what evaluation and tables report."""
        return self.turns[-1].raw_reward if self.turns else float("nan")

    def num_tokens(self) -> int:
        """Tokens that all agents sampled, messages to each other included."""
        return sum(
            len(completion.token_ids)
            for turn in self.turns[self.own_from :]
            for completion in (*turn.messages.values(), *turn.completions.values())
            if completion.token_ids is not None
        )


@dataclass(slots=True)
class Group:
    """Episodes, or the leaves of one turn tree, of one task. Example: Group(task=0, episodes=[Episode(...), Episode(...)])"""

    task: int
    episodes: list[Episode]
