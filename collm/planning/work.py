"""The work of one iteration: prompts, answers, episodes and sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from collm.envs.catalogue import make
from collm.errors import CollmError, ConfigError
from collm.models.sharing import joins
from collm.models.sources import folder_of
from collm.settings.rooms import Config

TEMPLATE = 8
"""Assumed number of tokens that a chat template adds to one message and its answer if it is not on this machine."""
CHARACTERS_PER_TOKEN = 4.0
"""Assumed for prompts if the model's tokenizer is not on this machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of an update holds: its tokens, the answers scored in it, and whether it is several sequences."""

    tokens: int
    answers: int
    branches: bool


@dataclass(frozen=True, slots=True)
class Work:
    """The size of one iteration if every answer has the greatest length.

    prompts: agent -> tokens of each turn's new observation. answer: tokens of an answer. episodes: number of episodes, leaves
    of turn trees included. joint_actions: joint actions that are learned from. note: assumptions made. template: tokens
    that the chat template adds to the first message and its answer, and to each later one.
    """

    agents: tuple[str, ...]
    prompts: Mapping[str, tuple[int, ...]]
    answer: int
    episodes: int
    joint_actions: int
    history: str
    note: str = ""
    examples: int = 0
    """Tokens of one agent's worked examples."""
    template: tuple[int, int] = (TEMPLATE, TEMPLATE)
    names: int = 0
    """Tokens of the agents' names in one message of a joint history."""
    group: int = 1
    """Siblings per task; in a tree, per node."""
    tree: bool = False
    different: int | None = None
    """Number of tasks with prompts of their own, where an iteration has more; None: all of its tasks differ."""

    @property
    def turns(self) -> int:
        return len(self.prompts[self.agents[0]])

    def _turns(self, readers: Sequence[str]) -> list[tuple[int, int]]:
        """(tokens of the observations with the template, tokens of the answers) of every turn, in a joint history if several
        read."""
        names = self.names if len(readers) > 1 else 0
        return [
            (self.template[turn > 0 and self.history != "newest"] + names + sum(self.prompts[agent][turn] for agent in readers),
             names + self.answer * len(readers))
            for turn in range(self.turns)
        ]  # fmt: skip

    def sequence(self, *readers: str, answered: bool = True) -> int:
        """Tokens of the longest history: of one agent, or of all `readers` in a joint history.

        answered: with the answers of its last turn.
        """
        turns, head = self._turns(readers), self.examples * len(readers)
        sizes = [asked + said for asked, said in turns]
        last = turns[-1][1] * (not answered)
        if self.history == "full":
            return head + sum(sizes) - last
        return head + (sizes[0] + max(sizes[1:]) if self.history == "last" and self.turns > 1 else max(sizes)) - last

    def rows(self, *readers: str, max_tokens: int, limit: int | None = None, answered: bool = True) -> list[Row]:
        """The rows that an update reads, as learning/pack.py makes them.

        Siblings share the prompt of the turn at which they part, and all before it; a task that an iteration has several times
        shares its first prompt, and different tasks share worked examples. With another history than "full", every turn is a
        sequence of its own and is counted with its prompt, which later turns of siblings need not share.

        Args: max_tokens: of a row. limit: of a sequence. answered: with the answers of the last turn.
        """
        length = self.sequence(*readers, answered=answered)
        if self.turns > 1 and self.history != "full":
            return [Row(min(length, limit or length), 1, False)] * (self.episodes * self.turns)
        head = self.examples * len(readers)
        turns, shared = self._turns(readers), [head]
        for asked, said in turns:
            shared[-1] += asked
            shared.append(shared[-1] + said)
        whole = limit is None or length <= limit
        tasks = max(1, self.episodes // self.leaves)
        times = math.ceil(tasks / min(self.different or tasks, tasks))
        rows: list[Row] = []
        for number in range(self.episodes):
            task, leaf = divmod(number, self.leaves)
            parted = self._parted(leaf) if leaf else 0
            same = (shared[parted] if leaf or task % times else head) if whole and number else 0
            new = (length if limit is None else min(length, limit)) - same
            if number and joins(rows[-1].tokens, same, new, max_tokens):
                before = rows[-1]
                rows[-1] = Row(before.tokens + new, before.answers + self.turns - parted, before.branches or new > 0)
            else:
                rows.append(Row(same + new, self.turns - parted, False))
        return rows

    @property
    def leaves(self) -> int:
        """Episodes of one task."""
        return self.group**self.turns if self.tree else self.group

    def _parted(self, leaf: int) -> int:
        """The turn at which a leaf parts from the one before it."""
        depth = self.turns - 1
        while self.tree and depth and leaf % self.group == 0:
            leaf, depth = leaf // self.group, depth - 1
        return depth if self.tree else 0


def work_of(config: Config) -> Work:
    """The work of one iteration. Prompts are measured on as many tasks as it has, at most 32; later turns on the first four,
    played with empty answers."""
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
    for task in range(min(32, max(4, config.rollout.tasks), int(getattr(env, "num_tasks", 1)))):
        for agent, texts in _observed(env, task, turns if task < 4 else 1).items():
            for turn in range(turns if task < 4 else 1):
                text = texts[min(turn, len(texts) - 1)]
                source = config.team.models.get(agent, config.team.model)
                longest[agent][turn] = max(longest[agent][turn], count_tokens(source, text))
    repeats = hasattr(env, "num_tasks") and _observed(env, 0, 1) == _observed(env, 0, 1, seed=1)
    different = int(env.num_tasks) if repeats else None
    group, tasks = config.algorithm.group_size, config.rollout.tasks
    if config.algorithm.tree:
        episodes, actions = tasks * group**turns, tasks * sum(group**turn for turn in range(1, turns + 1))
    else:
        episodes, actions = tasks * group, tasks * group * turns
    prompts = {agent: tuple(counts) for agent, counts in longest.items()}
    added = [template_tokens(config, config.team.models.get(agent, config.team.model)) for agent in agents]
    template = max(first for first, _ in added), max(later for _, later in added)
    examples = _example_tokens(config, template[1] + max(counts[0] for counts in prompts.values()))
    answer, history = config.rollout.max_tokens, config.rollout.history
    names = count_tokens(config.team.model, "\n".join(f"{agent}: x" for agent in agents)) - len(agents)
    return Work(
        agents, prompts, answer, episodes, actions, history, note, examples, template, names, group, config.algorithm.tree,
        different,
    )  # fmt: skip


def _example_tokens(config: Config, asked: int) -> int:
    """Tokens of one agent's examples if every answer has the greatest length, or of the whole file that holds them.

    asked: tokens of the longest first observation and of the template around it.
    """
    wanted = config.rollout.examples
    if isinstance(wanted, int):
        return wanted * (asked + config.rollout.max_tokens)
    try:
        return count_tokens(config.team.model, Path(wanted).read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise ConfigError(f"rollout.examples={wanted!r} cannot be read: {error.strerror}.") from error


def _observed(env: Any, task: int, turns: int, *, seed: int = 0) -> dict[str, list[str]]:
    """The observations of every agent at each turn of an episode in which all answers are empty."""
    observations, _ = env.reset(seed=seed, options={"task": task})
    texts = {agent: [str(text)] for agent, text in observations.items()}
    for _ in range(turns - 1):
        try:
            observations, *_ = env.step(dict.fromkeys(env.agents, ""))
        except CollmError:  # the environment cannot be stepped on this machine: later turns are assumed to be as long
            break
        for agent, text in observations.items():
            texts[agent].append(str(text))
        if not env.agents:
            break
    return texts


def count_tokens(source: str, text: str) -> int:
    """Number of tokens of a text, by the model's tokenizer if it is on this machine, otherwise estimated from its length."""
    folder = folder_of(source)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
    return len(_tokenizer(folder).encode(text, add_special_tokens=False))


def template_tokens(config: Config, source: str) -> tuple[int, int]:
    """Number of tokens that a model's chat template adds to the first message and its answer, its own system message or that of
    `team.system` included, and to each later one; `TEMPLATE` for both if it is not on this machine or fails."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    folder = folder_of(source)
    files = [] if folder is None else [folder / "tokenizer.json", folder / "chat_template.jinja"]
    if not files or not all(path.is_file() for path in files):
        return TEMPLATE, TEMPLATE
    tokenizer, text = _tokenizer(files[0].parent), files[1].read_text(encoding="utf-8")
    system = config.team.system
    head = [] if system in (None, "none") else [{"role": "system", "content": system}]
    chat = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    thinks = config.team.thinking != "off"
    added = []
    try:
        sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        template = sandbox.from_string(text)
        for length in (1, 3):
            rendered = template.render(
                messages=[*head, *chat[:length]], add_generation_prompt=True, enable_thinking=thinks, thinking=thinks
            )
            added.append(len(tokenizer.encode(rendered, add_special_tokens=False)) - length)
    except (TemplateError, TypeError, ValueError):
        return TEMPLATE, TEMPLATE
    first, both = added
    later = both - first
    return (min(first, later) if system == "none" else first), later


@cache
def _tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))
