"""`house_build`: builders share the materials of one blueprint and fill boxes with blocks, while spiders attack."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from collm.envs.base import Outcome, TextEnv, agent_names
from collm.envs.building.house_build_wording import HP, PLAIN, TERSE
from collm.envs.building.houses import (
    Cell,
    House,
    checked_size,
    distinct,
    from_below,
    generated,
    house_of,
    listing,
    rectangles,
    split_houses,
)
from collm.envs.building.lines import command_lines
from collm.envs.gathering.grid import NUM_GENERATED, Part
from collm.envs.wording import Wording, texts_of
from collm.errors import EnvError

COMMANDS = 600
SPIDERS = 3

_MARK = r"(?:[-*+]\s+|\d{1,3}[.)]\s+)?"
_KILL = r"/kill(?:\s+@e(?:\[\s*type\s*=\s*(?:minecraft:)?spider\s*(?:,[^\]]{0,60})?\])?)?"
_COMMAND = re.compile(rf"{_MARK}(?:{_KILL}|/fill" + r"\s+(\d{1,6})" * 6 + r"\s+(?:minecraft:)?([a-z_]{1,40}))", re.ASCII)


class HouseBuild(TextEnv):
    """Builders build the house of one blueprint, each with a limited number of every block, while spiders attack.

    All builders read the same blueprint, as rectangles per layer. An answer is a list of lines. `/fill x1 y1 z1 x2 y2 z2 block`
    fills the box between two opposite corners, both included, inside the house's box. `/kill` kills the spiders; a selector
    such as `@e[type=spider]` is allowed. List marks and code fences are allowed. Blocks are those of the blueprint, and `air`,
    which empties cells. With N builders, each may fill ceil(n / N) + floor(n / (2N)) cells with a block that the blueprint
    has n times. Every cell of a fill counts, even if it holds the block already; air is free, and overwriting refunds nothing.
    A fill that exceeds the rest of this limit is dropped whole. The first 600/N commands of an answer are executed, /kill
    included and dropped fills not counted; other lines and further commands are rejected and counted. Later builders overwrite
    earlier ones. The box is empty at the beginning of every turn.

    Three spiders, each of strength 1 to 3, drawn once per episode, attack in every turn in which no builder writes /kill:
    damage = min(1, sum of strengths / 5 HP).

    Raw reward of a turn, by `reward`:
        "match": correct cells (air included) / all cells of the box - 0.1 * damage. Shifted by -1; ends above 0.9.
        "coverage": 2 * filled target cells / target cells - 1.5 * filled other cells / target cells - 0.2 * damage, where
            "filled" means filled with any block. Shifted by -2; no early end.
    Ends after `turns` turns, or early as above.
    Perfect play earns 1 ("match") or 2 ("coverage"): the builders divide each block's cells within their limits and kill the
    spiders. With "match" an empty box earns the fraction of cells that are air, the metric `floor`; compare scores with it.
    Metrics of the last turn: match (fraction of correct cells), coverage and redundant (filled target cells and filled other
    cells / target cells), iou (of filled and target cells, for any block), hp (left of 5), floor (raw reward of an empty box
    with the spiders killed), written_by_both (fraction of target cells that at least two builders wrote), rejected (lines),
    dropped (fills).

    Args:
        agents: how many builders, or their names.
        turns: how many turns an episode has.
        size: width, height and depth of generated houses' boxes, 3 to 16 each.
        data: houses in the public format; repeated ones are dropped, and the last fifth of the distinct ones is held out.
        eval_data: a separate source of held-out houses; they are then removed from the training houses.
        houses: your own houses, as rows of the public format, played in both splits.
        reward: "match" rewards correct cells, "coverage" filled target cells.
        feedback: what a builder reads between turns, besides the HP and the number of its dropped fills: "score" the reward,
            "position" the number of wrong cells in each layer, "perfect" the first 20 wrong cells and their blocks.
        wording: "plain" or "terse", the wording that `tiny` knows.
        split: "train" or "eval". The generated houses of the two are disjoint.
    """

    def __init__(
        self,
        agents: int | Sequence[str] = 2,
        turns: int = 4,
        size: Sequence[int] = (6, 7, 7),
        data: str | None = None,
        eval_data: str | None = None,
        houses: Sequence[dict[str, Any]] | None = None,
        reward: Literal["match", "coverage"] = "match",
        feedback: Literal["score", "position", "perfect"] = "score",
        wording: Wording = "plain",
        split: str = "train",
    ):
        if isinstance(agents, int) and agents > COMMANDS:
            raise EnvError(f"agents={agents}: {COMMANDS} commands are split evenly; take at most {COMMANDS} builders.")
        super().__init__(agent_names(agents, "builder"), turns)
        for name, value, allowed in (
            ("reward", reward, ("match", "coverage")),
            ("feedback", feedback, ("score", "position", "perfect")),
            ("split", split, ("train", "eval")),
        ):
            if value not in allowed:
                raise EnvError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        self.size = checked_size(size)
        self.houses = _houses(data, eval_data, houses, split)
        self.part: Part = "eval" if split == "eval" else "train"
        self.num_tasks = NUM_GENERATED[self.part] if self.houses is None else len(self.houses)
        self.reward_mode, self.feedback = reward, feedback
        self.wording = texts_of(wording, PLAIN, TERSE)
        if reward == "match":
            self.shift, self.stop_above, self.max_reward = -1.0, 0.9, 1.0
        else:
            self.shift, self.stop_above, self.max_reward = -2.0, None, 2.0
        self.limit = COMMANDS // len(self.possible_agents)

    def house_of(self, task: int) -> House:
        """The house of one task."""
        return generated(self.part, self.size, task) if self.houses is None else self.houses[task]

    def begin(self, task: int, rng: random.Random) -> dict[str, str]:
        self.house = self.house_of(task)
        self.spiders = [rng.randint(1, 3) for _ in range(SPIDERS)]
        self.limits = {block: limit(count, len(self.agents)) for block, count in self.house.counts.items()}
        self._clear()
        return {agent: self.wording.first(self, agent) for agent in self.agents}

    def play(self, answers: dict[str, str]) -> Outcome:
        agents = list(answers)
        self._clear()
        for agent, answer in answers.items():
            self._carry_out(agent, answer)
        parts, metrics = self._judge()
        total = sum(parts.values())
        return Outcome(total, parts, {agent: self.wording.later(self, agent, total) for agent in agents}, metrics=metrics)

    def scripted_answers(self) -> dict[str, str]:
        """The builders fill equal shares of every block's cells, from the ground up, and the first kills the spiders."""
        number = len(self.possible_agents)
        shares: list[dict[Cell, str]] = [{} for _ in range(number)]
        for block, count in self.house.counts.items():
            cells = sorted((cell for cell, own in self.house.blocks.items() if own == block), key=from_below)
            for place, cell in enumerate(cells):
                shares[place // -(-count // number)][cell] = block
        return {agent: self._fills(share, kills=not index) for index, (agent, share) in enumerate(zip(self.agents, shares))}

    def _fills(self, blocks: dict[Cell, str], *, kills: bool) -> str:
        """Commands that fill exactly these cells."""
        parts = [(y, part) for y in range(self.house.size[1]) for part in rectangles(blocks, y)]
        fills = [f"/fill {part.x1} {y} {part.z1} {part.x2} {y} {part.z2} {part.block}" for y, part in parts]
        return "\n".join([*(["/kill"] if kills or not fills else []), *fills][: self.limit])

    def state(self) -> str:
        parts, _ = self._judge()
        return (
            f"house {self.house.name} turn {self.turn} of {self.turns} score {sum(parts.values()):.2f} hp {self.hp()}\n"
            f"blueprint:\n{listing(self.house.blocks)}\nbuild:\n{listing(self.build)}"
        ).rstrip()

    def num_parts(self, answer: str) -> int:
        return len(command_lines(answer))

    def task_name(self, task: int) -> str:
        return self.house_of(task).name

    def _clear(self) -> None:
        self.build: dict[Cell, str] = {}
        self.writers: dict[Cell, set[str]] = {}
        self.killed = False
        self.rejected = 0
        self.dropped = dict.fromkeys(self.possible_agents, 0)

    def _carry_out(self, agent: str, answer: str) -> None:
        """Execute one builder's commands and count those rejected or dropped."""
        left = dict(self.limits)
        commands = 0
        for line in command_lines(answer):
            found = _COMMAND.fullmatch(line) if len(line) < 200 else None
            if found is None or commands == self.limit or not self._is_possible(found):
                self.rejected += 1
                continue
            if found[7] is None:
                self.killed = True
            elif not self._fill(agent, [int(number) for number in found.groups()[:6]], found[7], left):
                self.dropped[agent] += 1
                continue
            commands += 1

    def _is_possible(self, command: re.Match[str]) -> bool:
        """Whether a fill stays inside the box and names a block of the blueprint or air; /kill is always possible."""
        if command[7] is None:
            return True
        inside = all(int(command[i + 1]) < self.house.size[i % 3] for i in range(6))
        return inside and (command[7] == "air" or command[7] in self.limits)

    def _fill(self, agent: str, corners: Sequence[int], block: str, left: dict[str, int]) -> bool:
        """Fill a box of cells unless its volume exceeds what is left of the block. Returns whether it was filled."""
        across, up, back = (
            range(min(one, other), max(one, other) + 1) for one, other in zip(corners[:3], corners[3:], strict=True)
        )
        if block != "air":
            volume = len(across) * len(up) * len(back)
            if volume > left[block]:
                return False
            left[block] -= volume
        for cell in ((x, y, z) for x in across for y in up for z in back):
            self.writers.setdefault(cell, set()).add(agent)
            if block == "air":
                self.build.pop(cell, None)
            else:
                self.build[cell] = block
        return True

    def _damage(self) -> float:
        """Fraction of the HP that the spiders take this turn."""
        return 0.0 if self.killed else min(1.0, sum(self.spiders) / HP)

    def hp(self) -> int:
        """HP that the spiders left this turn."""
        return HP if self.killed else max(0, HP - sum(self.spiders))

    def wrong(self) -> list[Cell]:
        """Cells whose block differs from the blueprint, from the ground up."""
        target = self.house.blocks
        return sorted((cell for cell in {*self.build, *target} if self.build.get(cell) != target.get(cell)), key=from_below)

    def _judge(self) -> tuple[dict[str, float], dict[str, float]]:
        """Reward parts and metrics of the present build."""
        target = self.house.blocks
        covered = len(self.build.keys() & target.keys())
        redundant = len(self.build) - covered
        match = 1.0 - len(self.wrong()) / self.house.volume
        if self.reward_mode == "match":
            parts = {"match": match, "damage": 0.0 - 0.1 * self._damage()}
        else:
            parts = {
                "coverage": 2.0 * covered / len(target),
                "redundant": 0.0 - 1.5 * redundant / len(target),
                "damage": 0.0 - 0.2 * self._damage(),
            }
        both = sum(len(self.writers.get(cell, ())) > 1 for cell in target)
        metrics = {
            "match": match,
            "coverage": covered / len(target),
            "redundant": redundant / len(target),
            "iou": covered / (len(target) + redundant),
            "hp": float(self.hp()),
            "floor": 1.0 - len(target) / self.house.volume if self.reward_mode == "match" else 0.0,
            "written_by_both": both / len(target),
            "rejected": float(self.rejected),
            "dropped": float(sum(self.dropped.values())),
        }
        return parts, metrics


def limit(count: int, agents: int) -> int:
    """Cells that each of `agents` builders may fill with a block that the blueprint has `count` times.

        ceil(count / agents) + floor(count / (2 agents))

    Together they can always fill all of them. With two or more builders none can do so alone, unless the count is 1.
    """
    return -(-count // agents) + count // (2 * agents)


def _houses(data: str | None, eval_data: str | None, houses: Sequence[dict[str, Any]] | None, split: str) -> list[House] | None:
    """The split's houses, or None if they are generated."""
    if houses is not None:
        if data is not None or eval_data is not None or not houses:
            raise EnvError(f"houses={list(houses)!r:.80} must hold at least one house; leave data and eval_data out with it.")
        return distinct(house_of(row, index) for index, row in enumerate(houses))
    if data is None:
        if eval_data is not None:
            raise EnvError(f"eval_data={eval_data!r} holds the evaluation houses of data; set data=... too.")
        return None
    return split_houses(data, eval_data, split)
