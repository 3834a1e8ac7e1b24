"""How much there is to do: prompts, answers, episodes and sequences of one iteration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from collm.envs.catalogue import make
from collm.errors import CollmError
from collm.planning.shapes import folder_of
from collm.settings.rooms import Config

TEMPLATE = 8
"""Assumed of a chat template: tokens around one message and its answer."""
CHARACTERS_PER_TOKEN = 4.0
"""Assumed of prompts where the model's tokenizer is not on this machine."""


@dataclass(frozen=True, slots=True)
class Work:
    """One iteration in numbers, every answer as long as it may be.

    prompts: agent -> tokens of each turn's new observation. answer: tokens of an answer. episodes: leaves of trees included.
    joint_actions: of which something is learnt. note: what had to be assumed.
    """

    agents: tuple[str, ...]
    prompts: Mapping[str, tuple[int, ...]]
    answer: int
    episodes: int
    joint_actions: int
    history: str
    note: str = ""

    @property
    def turns(self) -> int:
        return len(self.prompts[self.agents[0]])

    def sequence(self, *readers: str) -> int:
        """Tokens of the longest history with its answers: an agent's, or what a critic of several reads."""
        turns = [TEMPLATE + sum(self.prompts[agent][turn] + self.answer for agent in readers) for turn in range(self.turns)]
        if self.history == "full":
            return sum(turns)
        return turns[0] + max(turns[1:]) if self.history == "last" and self.turns > 1 else max(turns)

    @property
    def sequences(self) -> int:
        """Sequences per agent that one update reads: a growing chat is one, whatever its turns."""
        return self.episodes if self.history == "full" else self.episodes * self.turns


def work_of(config: Config) -> Work:
    """What one iteration plays: the agents' prompts as a few first tasks have them, answered with nothing."""
    note, options = "", config.env.options
    data = [str(options[key]) for key in ("data", "eval_data") if options.get(key)]
    absent = [name for name in data if name.startswith("hf:") or not Path(name.split("[")[0]).exists()]
    if absent:
        options = {key: value for key, value in options.items() if key not in ("data", "eval_data")}
        note = (
            f"Prompts are those of the built-in tasks, since {absent[0]} is not here (nothing is fetched from the hub to plan)."
        )
    env: Any = make(config.env.name, **options)
    agents, turns = tuple(env.possible_agents), int(getattr(env, "turns", 1))
    turns = min(turns, config.rollout.max_turns or turns)
    longest = {agent: [0] * turns for agent in agents}
    for task in range(min(4, int(getattr(env, "num_tasks", 1)))):
        for agent, texts in _observed(env, task, turns).items():
            for turn in range(turns):
                text = texts[min(turn, len(texts) - 1)]
                source = config.team.models.get(agent, config.team.model)
                longest[agent][turn] = max(longest[agent][turn], count_tokens(source, text))
    group, tasks = config.algorithm.group_size, config.rollout.tasks
    if config.algorithm.tree:
        episodes, actions = tasks * group**turns, tasks * sum(group**turn for turn in range(1, turns + 1))
    else:
        episodes, actions = tasks * group, tasks * group * turns
    prompts = {agent: tuple(counts) for agent, counts in longest.items()}
    return Work(agents, prompts, config.rollout.max_tokens, episodes, actions, config.rollout.history, note)


def _observed(env: Any, task: int, turns: int) -> dict[str, list[str]]:
    """What every agent reads at each turn of an episode in which nobody says a thing."""
    observations, _ = env.reset(seed=0, options={"task": task})
    texts = {agent: [str(text)] for agent, text in observations.items()}
    for _ in range(turns - 1):
        try:
            observations, *_ = env.step(dict.fromkeys(env.agents, ""))
        except CollmError:  # a world that cannot judge answers here: later turns are taken to be as long as the first
            break
        for agent, text in observations.items():
            texts[agent].append(str(text))
        if not env.agents:
            break
    return texts


def count_tokens(source: str, text: str) -> int:
    """Tokens of a text: by the model's tokenizer where it lies on this machine, else by its length."""
    folder = folder_of(source)
    if folder is not None and (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        known = _tokenizers.setdefault(str(folder), None) or Tokenizer.from_file(str(folder / "tokenizer.json"))
        _tokenizers[str(folder)] = known
        return len(known.encode(text, add_special_tokens=False))
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)


_tokenizers: dict[str, Any] = {}
