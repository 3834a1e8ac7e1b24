"""The gate: checks and converts everything that an environment returns, for training, evaluation, play and `check_env`.

Numbers of any kind that have a float value become floats. Observations must be text, and agents must be in `possible_agents`.
Anything else raises EnvError with one sentence, which fails that episode only.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pettingzoo import ParallelEnv

from collm.errors import EnvError
from collm.types import encodable

NAME = re.compile(r"\w(?:[\w .-]{0,58}[\w-])?")
RESERVED = frozenset(
    ("critic", "episodes", "evaluation", "iteration", "joint_actions", "loss", "reward", "seconds", "task", "team", "tokens")
)
"""Names that collm uses as the first part of record keys or as file names; agents cannot have them."""
MAX_TURNS = 1000
"""An episode that has not ended after so many turns fails, unless the environment's `turns` is larger."""


Step = tuple[dict[str, str], dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]]
"""What `env.step` returns, with plain values."""


def agents_of(env: ParallelEnv) -> tuple[str, ...]:
    """The names of `env.possible_agents`. Raises EnvError where one cannot be a file name and part of a record key."""
    agents = getattr(env, "possible_agents", None)
    if not isinstance(agents, Sequence) or isinstance(agents, str) or not agents:
        raise EnvError(f"possible_agents is {_shown(agents)}; name at least one agent, in a list.")
    seen: dict[str, str] = {}
    for agent in agents:
        if not isinstance(agent, str):
            raise EnvError(f"agent {_shown(agent)} is {type(agent).__name__}, not text; call it 'agent_{_shown(agent)}', say.")
        if not NAME.fullmatch(agent):
            raise EnvError(
                f"agent {_shown(agent)} cannot be the name of a file; use up to 60 letters, digits, '_', '-', '.' and spaces, "
                "with a letter, digit or '_' first."
            )
        key = unicodedata.normalize("NFKC", agent).casefold()
        if key in RESERVED:
            raise EnvError(f"agent {agent!r} has a name that collm's own records use; call it {agent + '_agent'!r}, say.")
        if key in seen:
            raise EnvError(f"agents {seen[key]!r} and {agent!r} share a name, or differ in case alone; rename one.")
        seen[key] = agent
    return tuple(agents)


def num_tasks_of(env: ParallelEnv) -> int:
    """How many tasks the environment has: `num_tasks`, or 1 without that attribute. Raises EnvError on fewer than one."""
    count = getattr(env, "num_tasks", 1)
    if number(count, "num_tasks") != int(count) or int(count) < 1:
        raise EnvError(f"num_tasks={_shown(count)} leaves nothing to play; give at least one task.")
    return int(count)


def number(value: Any, what: str) -> float:
    """The finite float value of `value`. Raises EnvError naming `what`."""
    if type(value) is float and math.isfinite(value):
        return value
    single = hasattr(type(value), "__float__") or hasattr(type(value), "__index__")
    if not single or isinstance(value, (str, bytes)) or getattr(value, "ndim", 0) != 0:
        raise EnvError(f"{what} is {_shown(value)}, not a number.")
    try:
        found = float(value)
    except Exception as error:
        raise EnvError(f"{what} is {_shown(value)}, not a number: {type(error).__name__}.") from error
    if not math.isfinite(found):
        raise EnvError(f"{what} is {found}, not a finite number.")
    return found


def reset(env: ParallelEnv, seed: int | None, task: int | None) -> tuple[dict[str, str], list[Any]]:
    """Reset the environment; returns the first observations and each `task_name` in the infos. Raises EnvError."""
    returned = env.reset(seed=seed, options=None if task is None else {"task": task})
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise EnvError(f"reset returned {_count(returned)}; return observations and infos.")
    observations, infos = returned
    live = _live(env)
    return texts(observations, live), [info["task_name"] for info in _infos(infos, live).values() if "task_name" in info]


def step(env: ParallelEnv, answers: Mapping[str, str]) -> Step:
    """Play one turn; returns checked values. Raises EnvError on a violation of the contract."""
    returned = env.step(dict(answers))
    if not isinstance(returned, tuple) or len(returned) != 5:
        raise EnvError(f"step returned {_count(returned)}; return observations, rewards, terminations, truncations and infos.")
    observations, rewards, terminations, truncations, infos = returned
    acted = list(answers)
    for name, mapping in (("rewards", rewards), ("terminations", terminations), ("truncations", truncations)):
        _mapping(mapping, name)
    missing = [agent for agent in acted if agent not in rewards]
    if missing:
        raise EnvError(f"rewards lack {', '.join(missing)}; every agent that acted gets the joint reward.")
    return (
        texts(observations, _live(env)),
        {agent: number(rewards[agent], f"{agent}'s reward") for agent in acted},
        {agent: _flag(terminations[agent], "terminations") for agent in acted if agent in terminations},
        {agent: _flag(truncations[agent], "truncations") for agent in acted if agent in truncations},
        {agent: _plain(info) for agent, info in _infos(infos, acted).items()},
    )


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    """An agent's info with its numbers as floats."""
    plain = dict(info)
    if "raw_reward" in info:
        plain["raw_reward"] = number(info["raw_reward"], "raw_reward")
    for key in ("reward_parts", "metrics"):
        if key in info:
            plain[key] = numbers(info[key], key)
    return plain


def numbers(mapping: Any, what: str) -> dict[str, float]:
    """A mapping from names to floats. Raises EnvError naming the first value that is not a number."""
    _mapping(mapping, what)
    for name in mapping:
        if not isinstance(name, str) or not name.isprintable() or encodable(name) != name:
            raise EnvError(f"{what} has the name {_shown(name)}; use printable text.")
    return {str(name): number(value, f"{what}[{name!r}]") for name, value in mapping.items()}


def texts(observations: Any, live: Sequence[str]) -> dict[str, str]:
    """Observations, of keys that are text, as text that UTF-8 can encode. Raises EnvError where a live agent has none."""
    _mapping(observations, "observations")
    missing = [agent for agent in live if agent not in observations]
    if missing:
        raise EnvError(f"observations lack {', '.join(missing)}; every live agent reads something.")
    for agent, text in observations.items():
        if not isinstance(text, str):
            raise EnvError(f"{_shown(agent)} observed {type(text).__name__}, not text.")
    return {agent: encodable(str(text)) for agent, text in observations.items() if isinstance(agent, str)}


def _live(env: ParallelEnv) -> list[str]:
    """The live agents. Raises EnvError where one is not in `possible_agents` or is listed twice."""
    agents = list(env.agents) if isinstance(env.agents, Iterable) else [env.agents]
    for agent in agents:
        if agent not in env.possible_agents or agents.count(agent) > 1:
            raise EnvError(f"agents holds {_shown(agent)}, which possible_agents lacks or which is there twice.")
    return agents


def _infos(infos: Any, agents: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The infos of these agents that are not empty."""
    _mapping(infos, "infos")
    found = {agent: infos[agent] for agent in agents if infos.get(agent) is not None}
    for agent, info in found.items():
        _mapping(info, f"{agent}'s info")
    return {agent: info for agent, info in found.items() if info}


def _mapping(value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise EnvError(f"{what} is {type(value).__name__}, not a dict.")


def _flag(value: Any, what: str) -> bool:
    try:
        return bool(value)
    except Exception as error:
        raise EnvError(f"{what} holds {_shown(value)}, neither True nor False.") from error


def _count(returned: Any) -> str:
    return f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__


def _shown(value: Any) -> str:
    try:
        text = ascii(value)
    except Exception:
        return type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
