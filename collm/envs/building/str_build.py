"""`str_build`: builders with different blocks build a word as pixels."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.building.font import SIZE, cells, split_words, width
from collm.envs.building.lines import command_lines
from collm.envs.building.str_build_wording import PLAIN, TERSE
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError

Cell = tuple[int, int]

PALETTES = (
    ("oak_planks", "stone"),
    ("white_concrete", "obsidian"),
    ("bricks", "glass"),
    ("sandstone", "glowstone"),
    ("gold_block", "iron_block"),
    ("red_wool", "blue_wool"),
    ("birch_planks", "andesite"),
    ("quartz_block", "coal_block"),
)
REFERENCE = {"train": ("I", "C", "M", "L", "MC", "CM", "LI", "LLM"), "eval": ("ICML", "CLIM")}
COMMANDS = 300

_SYMBOLS = dict(zip((block for palette in PALETTES for block in palette), "0123456789abcdef", strict=True))

_COMMAND = re.compile(
    r"(?:[-*+]\s+|\d{1,3}[.)]\s+)?/setblock\s+(\d{1,6})\s+(\d{1,6})\s+(\d{1,6})\s+(?:minecraft:)?([a-z_]{1,40})", re.ASCII
)


class StrBuild(TextEnv):
    """Builders fill the pixels of a word, each with its own two blocks.

    An answer is a list of lines `/setblock x y z block` with whole numbers inside the box (x to the right, y up, z = 0); a list
    mark or a code fence is allowed. Any other line, a block of another builder, and commands over the limit are rejected and
    counted. Later builders overwrite earlier ones; `air` empties a cell.

    Raw reward of a build = 2 * coverage - 1.5 * extra / background - adjacency - 0.25 * missing_blocks, where
        coverage: fraction of target cells that are filled with any block;
        extra: number of filled cells outside the target; background: number of cells outside the target;
        adjacency: fraction of 4-adjacent filled pairs that hold the same block;
        missing_blocks: number of builders of whose two blocks at least one is not in the build.
    Ends after `turns` turns, or once the raw reward exceeds 1.9.
    An empty build earns -0.25 per builder; perfect play earns 2: each builder fills the cells of one colour of a chessboard
    and alternates its two blocks over them.
    Metrics: iou, coverage, extra, adjacency, written_by_both (fraction of target cells that at least two builders wrote: in the
    last turn if `world` is "fresh", in all turns if it is "persistent"), rejected, missing_blocks; with reward="sparse" also
    score, the raw reward of the present build.

    Args:
        agents: how many builders (at most 8, the number of palettes), or their names.
        turns: how many turns an episode has.
        strings: the words to build; default: the reference's. "english" takes common words of `lengths` letters.
        eval_strings: the held-out words if `strings` is a list.
        lengths: with strings="english", the word lengths.
        data: a CSV file with a column `string`, in the public format; the last fifth of its words is held out.
        world: "fresh" empties the box before every turn; "persistent" keeps blocks, shows the build, and limits the blocks of
            each turn.
        reward: "dense" gives a reward every turn, shifted by -2; "sparse" gives the unshifted reward of the last build in the
            last turn, 0 before, and never ends early.
        commands_per_turn: blocks that one builder may place in a turn if `world` is "persistent"; default:
            1.25 * target cells / (agents * turns), rounded up.
        feedback: what builders read between turns: "position" the target cells, "perfect" the wrong cells, each with the
            builder that should mend it, "score" the last reward.
        blind_first_turn: hide the target in the first turn, as the reference does.
        view: what a builder reads between turns. "all": the build and feedback on it; "own": the blocks that it has placed
            itself, also where others have overwritten them since, and feedback on those alone.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval".
    """

    shift = -2.0
    stop_above: float | None = 1.9
    max_reward = 2.0

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 4,
        strings: Sequence[str] | Literal["english"] | None = None,
        eval_strings: Sequence[str] | None = None,
        lengths: Sequence[int] = (3,),
        data: str | None = None,
        world: Literal["fresh", "persistent"] = "fresh",
        reward: Literal["dense", "sparse"] = "dense",
        commands_per_turn: int | None = None,
        feedback: Literal["position", "perfect", "score"] = "position",
        blind_first_turn: bool = False,
        view: Literal["all", "own"] = "all",
        wording: Wording = "plain",
        split: str = "train",
    ):
        super().__init__(agent_names(agents, "builder"), turns)
        if len(self.possible_agents) > len(PALETTES):
            raise EnvError(f"agents={agents!r}: there are palettes for {len(PALETTES)} builders; take at most that many.")
        for name, value, allowed in (
            ("world", world, ("fresh", "persistent")),
            ("reward", reward, ("dense", "sparse")),
            ("feedback", feedback, ("position", "perfect", "score")),
            ("view", view, ("all", "own")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        if commands_per_turn is not None and (world == "fresh" or commands_per_turn < 1):
            raise EnvError(f"commands_per_turn={commands_per_turn} needs world='persistent' and a number above 0.")
        self.words = _words(strings, eval_strings, tuple(lengths), data, split)
        self.num_tasks = len(self.words)
        self.palettes = dict(zip(self.possible_agents, PALETTES, strict=False))
        self.world, self.reward_mode, self.feedback = world, reward, feedback
        self.blind_first_turn, self.view = blind_first_turn, view
        self.commands_per_turn = commands_per_turn
        self.wording = texts_of(wording, PLAIN, TERSE)

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.word = self.words[task]
        self.target = cells(self.word)
        self.width = width(self.word)
        self.build: dict[Cell, str] = {}
        self.own: dict[str, dict[Cell, str]] = {agent: {} for agent in self.agents}
        self.writers: dict[Cell, set[str]] = {}
        self.rejected = 0
        self.limit = COMMANDS // len(self.agents)
        if self.world == "persistent":
            share = math.ceil(1.25 * len(self.target) / (len(self.agents) * self.turns))
            self.limit = min(self.limit, self.commands_per_turn or share)
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        agents = list(answers)
        if self.world == "fresh":
            self.build, self.writers, self.rejected = {}, {}, 0
            self.own = {agent: {} for agent in agents}
        for agent, answer in answers.items():
            self._place(agent, answer)
        parts, metrics = self._judge(self.build, agents)
        total = sum(parts.values())
        if self.reward_mode == "sparse":
            metrics["score"] = total
            total, shift = (total if self.last_turn else 0.0), 0.0
            parts = parts if self.last_turn else {}
        else:
            shift = self.shift
        observations = {agent: self.wording.later(self, agent, self._told(agent, total)) for agent in agents}
        return Outcome(total, parts, observations, shift=shift, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """Builder i of N fills the target cells whose x + y leaves the remainder i and alternates its two blocks over them.

        In a persistent box it skips cells that are filled and empties those of its remainder that are not in the target.
        """
        return {agent: self._share(index, agent) for index, agent in enumerate(self.agents)}

    def _share(self, index: int, agent: str) -> str:
        number = len(self.possible_agents)
        own = sorted(cell for cell in self.target if sum(cell) % number == index)
        blocks = {cell: self.palettes[agent][(sum(cell) if number == 1 else place) % 2] for place, cell in enumerate(own)}
        wanted = blocks
        if self.world == "persistent":
            build = self.shown(agent)
            extra = sorted(cell for cell in build.keys() - self.target if sum(cell) % number == index)
            missing = {cell: block for cell, block in blocks.items() if cell not in build}
            wanted = missing | dict.fromkeys(extra, "air") or blocks
        return "\n".join(f"/setblock {x} {y} 0 {block}" for (x, y), block in list(wanted.items())[: self.limit])

    def state(self) -> str:
        parts, _ = self._judge(self.build, self.possible_agents)
        return (
            f"word {self.word} turn {self.turn} of {self.turns} score {sum(parts.values()):.2f}\ntarget:\n"
            + self.rows(lambda cell: "#" if cell in self.target else ".")
            + "\nbuild:\n"
            + self.drawn(self.build)
        )

    def num_parts(self, answer: str) -> int:
        return len(command_lines(answer))

    def task_name(self, task: int) -> str:
        return self.words[task]

    def _place(self, agent: str, answer: str) -> None:
        """Execute one builder's commands and count the rejected lines."""
        allowed = {*self.palettes[agent], "air"}
        placed = 0
        for line in command_lines(answer):
            found = _COMMAND.fullmatch(line) if len(line) < 200 else None
            cell = (int(found[1]), int(found[2])) if found else (-1, -1)
            inside = 0 <= cell[0] < self.width and 0 <= cell[1] < SIZE
            if found is None or not inside or int(found[3]) or found[4] not in allowed or placed == self.limit:
                self.rejected += 1
                continue
            placed += 1
            self.writers.setdefault(cell, set()).add(agent)
            for build in (self.build, self.own[agent]):
                if found[4] == "air":
                    build.pop(cell, None)
                else:
                    build[cell] = found[4]

    def _judge(self, build: dict[Cell, str], agents: Sequence[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Reward parts and metrics of a build by these builders."""
        built = set(build)
        covered, extra = len(built & self.target), len(built - self.target)
        background = self.width * SIZE - len(self.target)
        pairs = [
            (cell, other) for cell in built for other in ((cell[0] + 1, cell[1]), (cell[0], cell[1] + 1)) if other in built
        ]
        same = sum(build[cell] == build[other] for cell, other in pairs)
        adjacency = same / len(pairs) if pairs else 0.0
        used = set(build.values())
        missing = sum(not used.issuperset(self.palettes[agent]) for agent in agents)
        both = sum(len(self.writers.get(cell, ())) > 1 for cell in self.target)
        parts = {
            "coverage": 2.0 * covered / len(self.target),
            "extra": -1.5 * extra / background,
            "adjacency": -adjacency,
            "missing_blocks": -0.25 * missing,
        }
        metrics = {
            "iou": covered / (len(self.target) + extra),
            "coverage": covered / len(self.target),
            "extra": float(extra),
            "adjacency": adjacency,
            "written_by_both": both / len(self.target),
            "rejected": float(self.rejected),
            "missing_blocks": float(missing),
        }
        return parts, metrics

    def _told(self, agent: str, total: float) -> float:
        """The reward that a builder reads: the team's, or that of its own blocks alone."""
        if self.view == "all" or (self.reward_mode == "sparse" and not self.last_turn):
            return total
        return sum(self._judge(self.own[agent], [agent])[0].values())

    def shown(self, agent: str) -> dict[Cell, str]:
        """The blocks that a builder sees."""
        return self.own[agent] if self.view == "own" else self.build

    def wrong(self, agent: str) -> list[tuple[Cell, str]]:
        """Missing and extra cells with the builder that should mend each; under view="own" those of this builder."""
        names = self.possible_agents
        if self.view == "all":
            return [(cell, names[sum(cell) % len(names)]) for cell in sorted(set(self.build) ^ self.target)]
        own = set(self.own[agent])
        part = {cell for cell in self.target if names[sum(cell) % len(names)] == agent}
        return [(cell, agent) for cell in sorted((own - self.target) | (part - own))]

    def drawn(self, build: dict[Cell, str]) -> str:
        """A build as text: `.` for an empty cell, else the character of its block."""
        return self.rows(lambda cell: _SYMBOLS[build[cell]] if cell in build else ".")

    def legend(self, agent: str) -> str:
        """The character of each block that this builder may see."""
        palettes = [self.palettes[agent]] if self.view == "own" else self.palettes.values()
        return ", ".join(f"{_SYMBOLS[block]} {block}" for palette in palettes for block in palette)

    def rows(self, symbol: Callable[[Cell], str]) -> str:
        """The box as text, one character per cell, the top row first."""
        return "\n".join("".join(symbol((x, y)) for x in range(self.width)) for y in reversed(range(SIZE)))


def _words(
    strings: Sequence[str] | str | None,
    eval_strings: Sequence[str] | None,
    lengths: tuple[int, ...],
    data: str | None,
    split: str,
) -> list[str]:
    if data is not None:
        listed = read_strings(data)
        held_out = max(1, len(listed) // 5)
        words: Iterable[str] = listed[-held_out:] if split == "eval" else listed[:-held_out] or listed
    elif strings is None:
        words = REFERENCE["eval" if split == "eval" else "train"]
    elif isinstance(strings, str):
        if eval_strings is not None:
            raise EnvError(
                "eval_strings goes with a list of strings; with strings='english' the list's own words are held out."
            )
        if strings != "english":
            raise EnvError(f"strings={strings!r} is neither a list of words nor 'english'.")
        words = split_words(split, lengths)
    else:
        if split == "eval" and eval_strings is None:
            raise EnvError("strings is a list, but no word is held out: give eval_strings=[...], or set evaluation.every=0.")
        words = strings if split == "train" or eval_strings is None else eval_strings
    words = [str(word).strip().upper() for word in words]
    if not words:
        raise EnvError("there are no words to build; give strings=[...], or lengths between 2 and 4 with strings='english'.")
    for word in words:
        cells(word)
    return words


def read_strings(path: str) -> list[str]:
    """The column `string` of a CSV file in the public StrBuild format. Raises EnvError if it cannot be read."""
    import csv

    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            return [str(row["string"].strip()) for row in csv.DictReader(file)]
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise EnvError(f"data={path!r} is not a CSV file with a column 'string': {error!r}.") from error
