"""The base class of environments: PettingZoo's ParallelEnv with text observations and text actions.

An environment of your own subclasses `TextEnv` and defines two methods: `begin` (the first observation of each agent) and
`play` (the outcome of one turn's answers). `TextEnv` counts turns, shifts the reward, ends episodes early and does
PettingZoo's bookkeeping.
"""

from __future__ import annotations

import random
import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gymnasium import spaces
from pettingzoo import ParallelEnv

from collm import seeds
from collm.errors import EnvError

MAX_CHARACTERS = 1 << 22


class EnvMaker(Protocol):
    """Makes a new environment for each episode; `EnvSpec` of the catalogue is one."""

    def make(self, split: str) -> ParallelEnv: ...


class _AnyScript(Sequence[str]):
    """Every character of Unicode, in order, computed on access."""

    def __len__(self) -> int:
        return sys.maxunicode + 1

    def __getitem__(self, index: Any) -> Any:
        return [chr(i) for i in range(len(self))[index]] if isinstance(index, slice) else chr(range(len(self))[index])

    def __contains__(self, x: object) -> bool:
        return isinstance(x, str) and len(x) == 1


_ANY_SCRIPT = _AnyScript()


class TextSpace(spaces.Text):
    """Any string of at most `max_length` characters, in any script. Samples are short and hostile, for testing environments.

    Gymnasium's `flatten` returns an array (max_length,) of code points, padded with the number after the last code point.
    """

    def __init__(self, max_length: int = MAX_CHARACTERS):
        super().__init__(max_length=max_length, min_length=0)

    @property
    def character_set(self) -> Any:
        return _ANY_SCRIPT

    @property
    def character_list(self) -> Any:
        return _ANY_SCRIPT

    def character_index(self, char: str) -> Any:
        return ord(char)

    def __repr__(self) -> str:
        return f"TextSpace(max_length={self.max_length})"

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """Up to 60 characters of ASCII, control characters and other scripts."""
        length = int(self.np_random.integers(0, 60))
        pools = ((32, 127), (0, 32), (0xA0, 0x2000), (0x1F300, 0x1F600))
        picks = self.np_random.choice(4, size=length, p=(0.85, 0.05, 0.05, 0.05))
        return "".join(chr(int(self.np_random.integers(*pools[pick]))) for pick in picks)


@dataclass(slots=True)
class Outcome:
    """The outcome of one turn.

    reward: the raw joint reward. parts: its named parts. observations: the next observation of each agent. done: whether the
    environment ends the episode. shift: replaces the environment's `shift` for this turn. metrics: environment metrics, name ->
    number; those of the last turn are reported.
    Example: Outcome(1.0, {"match": 1.0}, {"agent_0": "You agreed.", "agent_1": "You agreed."}, metrics={"match": 1.0})
    """

    reward: float
    parts: dict[str, float]
    observations: dict[str, str]
    done: bool = False
    shift: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class TextEnv(ParallelEnv[str, str, str]):
    """A cooperative environment of texts with one joint reward.

    Class attributes that a subclass may set:
        shift: added to every raw reward; minus the greatest raw reward, say, so that an early end never lowers the return.
        stop_above: the episode ends once a raw reward exceeds it (None: no early end).
        max_reward: the greatest raw reward of a turn; scores are percentages of it (None: no maximum).
        has_messages: True if agents can send each other text by the rules.
        waits: True if a turn waits (for a sandbox, a server) rather than computes; such environments are stepped in threads.
        diagnostics: names of metrics that are reported and shown but never given to a critic or to the metric regression.
        num_tasks: how many tasks the split has.
    """

    shift: float = 0.0
    stop_above: float | None = None
    max_reward: float | None = 1.0
    has_messages: bool = False
    waits: bool = False
    diagnostics: frozenset[str] = frozenset()
    num_tasks: int = 1

    def __init__(self, agents: Sequence[str], turns: int):
        if turns < 1:
            raise EnvError(f"turns={turns} leaves nothing to play; set turns=1 or more.")
        self.metadata = {"name": type(self).__name__, "render_modes": []}
        self.render_mode = None
        self.possible_agents = list(agents)
        self.agents: list[str] = []
        self.turns = turns
        self.turn = 0
        self.task = 0
        self._space = TextSpace()

    @abstractmethod
    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        """Set up task number `task` and return the first observation of each agent. All randomness comes from `rng`."""

    @abstractmethod
    def play(self, answers: dict[str, str]) -> Outcome:
        """Play one turn and return its outcome. `self.turn` counts from 0; `self.last_turn` is True in the last turn."""

    def state(self) -> str:
        """The privileged view of the present state, which a critic may read and agents do not."""
        return ""

    def scripted_answers(self) -> dict[str, str]:
        """Answers of a scripted player to the present observations, one per agent; {} if the environment has no such player.

        They earn a good reward, not always the best one. They serve as worked examples and for imitation.
        """
        return {}

    def num_parts(self, answer: str) -> int | None:
        """The number of parts of an answer that the metric `rejected` counts: its lines, say, or 1 if answers are counted.

        None, the default, means unknown: the fraction of rejected parts is then not computed. The number depends on the text
        alone, not on the present task.
        """
        return None

    def task_name(self, task: int) -> str:
        """The name of a task in tables and logs."""
        return str(task)

    @property
    def last_turn(self) -> bool:
        return self.turn == self.turns - 1

    def observation_space(self, agent: str) -> TextSpace:
        return self._space

    def action_space(self, agent: str) -> TextSpace:
        return self._space

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Start task `options["task"]` (a number below `num_tasks`; drawn from the seed if absent).

        The infos are empty, since wrappers that turn infos into tensors (torchrl's) refuse text. `task_name` names the task.
        """
        rng = random.Random() if seed is None else seeds.stream(seed, "env")
        task = (options or {}).get("task")
        self.task = rng.randrange(self.num_tasks) if task is None else int(task)
        if not 0 <= self.task < self.num_tasks:
            raise EnvError(f"task={self.task} does not exist; this split has tasks 0..{self.num_tasks - 1}.")
        self.agents = list(self.possible_agents)
        self.turn = 0
        observations = self.begin(self.task, rng)
        return observations, {agent: {} for agent in self.agents}

    def step(
        self, actions: Mapping[str, str]
    ) -> tuple[dict[str, str], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]:
        """Play one turn with all agents' answers. Raises EnvError on a missing answer or after the end."""
        if not self.agents:
            raise EnvError("step() after the end of the episode; call reset() first.")
        missing = [agent for agent in self.agents if agent not in actions]
        if missing:
            raise EnvError(f"no answer from {', '.join(missing)}; every live agent answers every turn.")
        agents = list(self.agents)
        outcome = self.play({agent: str(actions[agent]) for agent in agents})
        done = outcome.done or self.last_turn or (self.stop_above is not None and outcome.reward > self.stop_above)
        reward = outcome.reward + (self.shift if outcome.shift is None else outcome.shift)
        self.turn += 1
        if done:
            self.agents = []
        info = {"raw_reward": outcome.reward, "reward_parts": outcome.parts, "metrics": outcome.metrics}
        return (
            {agent: outcome.observations.get(agent, "") for agent in agents},
            {agent: reward for agent in agents},
            {agent: done for agent in agents},
            {agent: False for agent in agents},
            {agent: dict(info) for agent in agents},
        )

    def render(self) -> None:
        return None

    def close(self) -> None:
        return None


def agent_names(agents: int | Sequence[str], stem: str) -> list[str]:
    """The names of agents: `2` gives stem_0 and stem_1; a list of names is kept.

    Raises EnvError on an empty list or a repeated name.
    """
    names = [f"{stem}_{index}" for index in range(agents)] if isinstance(agents, int) else [str(a) for a in agents]
    if not names or len(set(names)) < len(names):
        raise EnvError(f"agents={agents!r} must name at least one agent, each once.")
    return names
