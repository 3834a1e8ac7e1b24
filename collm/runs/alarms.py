"""Alarms: sentences about metrics that indicate degenerate answers, updates that teach nothing, or a loss of what was learned.

Each alarm is raised once in a run. Its number is `alarm/METRIC` in that iteration's record, so that the report shows the same
sentence. docs/alarms.md lists them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pettingzoo import ParallelEnv

from collm.types import Episode

LARGE_GAP = 0.05
"""Limit, in nats, of the mean difference per token between the engine's and the learner's log-probs; above it the two
compute different policies."""
LARGE_VOCABULARY = 10_000
"""Vocabularies above it have a tail of unlikely tokens whose probabilities add up."""
FEWEST_TASKS = 4
"""Distinct first observations that are needed to compare an agent's answers to them."""
PREFIX = "alarm/"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a metric raises an alarm, and the sentence."""

    metric: str
    """A metric's name, or its part after the name of an agent or a policy."""
    limit: float
    text: str
    """The sentence; {value}, {percent}, {limit} and {who} (the agent or policy) are filled in."""
    below: bool = False
    """Whether values below the limit raise it, instead of values above."""
    of_first: bool = False
    """The limit is a fraction of the run's first value."""
    when: Literal["always", "first", "later", "trained", "stuck"] = "always"
    """In every record; in that of the first iteration, or not before the second (a new critic's values are 0); after training
    has begun; or while the reward is not above its first value."""

    def who(self, name: str) -> str | None:
        """The agent or policy in a metric's name, empty if it has none; None for another metric."""
        owner, slash, rest = name.rpartition(f"/{self.metric}")
        return owner if slash and not rest else "" if name == self.metric else None

    def broken(self, name: str, record: Mapping[str, Any], first: Mapping[str, float]) -> bool:
        value, limit = record[name], self.limit * (first.get(name, 0.0) if self.of_first else 1.0)
        reward = "evaluation/reward" if name.startswith("evaluation/") else "reward/raw"
        due = {
            "always": True,
            "first": record["iteration"] == 1,
            "later": record["iteration"] > 1,
            "trained": record["iteration"] > 0,
            "stuck": record["iteration"] > 0 and record.get(reward, 0.0) <= first.get(reward, 0.0),
        }
        return due[self.when] and (value < limit if self.below else value > limit)


def _looks(metric: str, limit: float, meaning: str, *, below: bool = False) -> Rule:
    """A rule about held-out answers that follows from an environment's metric."""
    side = "below" if below else "above"
    text = f"held-out {metric} is {{value:.2f}}, {side} {{limit:g}}: {meaning}, whatever the reward is. Read some answers "
    return Rule(f"evaluation/{metric}", limit, f"{text}(collm evaluate RUN --show 3).", below=below, when="trained")


RULES = (
    Rule(
        "zero_advantages",
        0.5,
        "{percent} of the answers of {who} have advantage 0 and teach nothing: all answers of a group earned the same. If the "
        "task is not solved, raise rollout.temperature or algorithm.group_size, or take tasks of another difficulty.",
        when="later",
    ),
    Rule(
        "entropy_estimate",
        0.1,
        "the entropy of {who} fell to {value:.3f} nats per token, below a tenth of its first value, and the reward is not "
        "above its first: answers no longer vary. Lower learner.lr, or raise rollout.temperature or algorithm.kl_coef.",
        below=True,
        of_first=True,
        when="stuck",
    ),
    Rule(
        "answer_tokens",
        0.2,
        "answers shrank to {value:.1f} tokens, below a fifth of their first length, and the reward is not above its first. "
        "Lower learner.lr, or set algorithm.kl_coef=0.01; read some answers (collm evaluate RUN --show 3).",
        below=True,
        of_first=True,
        when="stuck",
    ),
    Rule(
        "answers_repeated",
        0.5,
        "an agent gave the same answer to {percent} of the different tasks of one iteration, and the reward is not above its "
        "first. Read some answers (collm evaluate RUN --show 3); lower learner.lr if it began during training.",
        when="stuck",
    ),
    Rule(
        "answers_rejected",
        0.5,
        "the environment rejected {percent} of what the first iteration's answers hold: the model does not follow the format. "
        "See docs/alarms.md, and read some answers (collm evaluate RECIPE --show 3).",
        when="first",
    ),
    Rule(
        "logprob_gap_mean",
        LARGE_GAP,
        "the engine's log-probs of {who} differ from the learner's by {value:.3f} nats per token (limit {limit:g}): it answers "
        "with other weights, or in another number format, than are trained. Set team.compute='float32', or see whether "
        "Engine.load takes new weights.",
    ),
    Rule(
        "replay_mismatch",
        0.0,
        "replays of {percent} of the answers came to other observations or metrics than were recorded: the environment has "
        "randomness that reset(seed=...) does not determine. These answers have no difference baseline. Seed the environment "
        "(`collm check` tests this). Set algorithm.teammates='effects' or 'none' if it cannot be seeded.",
    ),
    Rule(
        "unfiltered_vocabulary",
        LARGE_VOCABULARY,
        "answers are drawn from all {value:,.0f} tokens of the vocabulary (temperature of 1 or more, top_p=1, top_k=0): "
        "unlikely tokens together are frequent and spoil answers. Set rollout.temperature=0.7.",
    ),
    Rule(
        "reward_kept",
        0.75,
        "the training reward of the last three iterations is {percent} of the best mean of three iterations: the team loses "
        "what it had learned. Lower learner.lr, or raise rollout.tasks. The checkpoint with the best held-out reward is kept.",
        below=True,
    ),
    Rule(
        "value_outside",
        0.2,
        "the mean value of {who} is outside the range of all returns seen so far, by {percent} of its width: advantages then "
        "have one sign, whatever the answers are. Set critic.metrics='auto'; with a language model as critic, lower critic.lr "
        "or set critic.body='none'.",
        when="later",
    ),
    _looks("repetition", 0.5, "answers repeat themselves"),
    _looks("source_overlap", 0.9, "answers copy their source"),
    _looks("source_words", 0.1, "answers have nothing to do with their source", below=True),
)


class Alarms:
    """The alarms of one run: which were raised, and the first values that later ones are compared with.

    Example: Alarms([]).raised({"iteration": 1, "answers_rejected": 0.8}) == {"answers_rejected": 0.8}
    Args: records: the run's records so far.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()):
        self.first: dict[str, float] = {}
        self.before: set[str] = set()
        self.rewards: dict[int, float] = {}
        self.lowest, self.highest = math.inf, -math.inf
        self.ranged = True
        for record in records:
            self._note(record)
            self.before |= {name.removeprefix(PREFIX) for name in record if name.startswith(PREFIX)}

    def raised(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Metric -> its number, of the alarms that the record raises and that were not raised before."""
        self._note(record)
        record = {**record, **self._compared(record)}
        found = {name: record[name] for name, rule in _ruled(record) if rule.broken(name, record, self.first)}
        new = {name: value for name, value in found.items() if name not in self.before}
        self.before |= new.keys()
        return new

    def _note(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                self.first.setdefault(name, value)
        if "reward/raw" in record:
            self.rewards[record["iteration"]] = record["reward/raw"]
            self.ranged = self.ranged and "return_lowest" in record  # a record of before does not tell its returns
        self.lowest = min(self.lowest, record.get("return_lowest", math.inf))
        self.highest = max(self.highest, record.get("return_highest", -math.inf))

    def _compared(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Numbers of a record beside those before it.

        reward_kept: mean training reward of the last three iterations, as a fraction of the best such mean where that is
        positive. CRITIC/value_outside: distance of the mean value from the range of all returns so far, as a fraction of its
        width.
        """
        numbers: dict[str, float] = {}
        rewards = list(self.rewards.values())
        means = [math.fsum(rewards[i : i + 3]) / 3 for i in range(len(rewards) - 2)]
        if means and max(means) > 0:
            numbers["reward_kept"] = means[-1] / max(means)
        width = self.highest - self.lowest
        for name, value in record.items():
            if self.ranged and width > 0 and name.endswith("critic/value") and isinstance(value, float):
                numbers[f"{name}_outside"] = max(self.lowest - value, value - self.highest, 0.0) / width
        return numbers


def sentence(name: str, value: float) -> str:
    """The alarm's sentence for a metric and its number; empty for a metric without a rule."""
    for found, rule in _ruled({name: value}):
        return rule.text.format(value=value, percent=f"{value:.0%}", limit=rule.limit, who=rule.who(found))
    return ""


def recorded(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The alarms of a run's records, in order, each with its iteration."""
    found = []
    for record in records:
        for name, value in record.items():
            if name.startswith(PREFIX) and value is not None and (text := sentence(name.removeprefix(PREFIX), value)):
                found.append(f"warning after iteration {record['iteration']}: {text}")
    return found


def _ruled(record: Mapping[str, Any]) -> Iterator[tuple[str, Rule]]:
    """The metrics of a record that have a number and a rule; alarms themselves have none."""
    for name, value in record.items():
        if isinstance(value, (int, float)) and not name.startswith(PREFIX):
            for rule in RULES:
                if rule.who(name) is not None:
                    yield name, rule


def answer_metrics(episodes: Sequence[Episode], env: ParallelEnv) -> dict[str, float]:
    """What alarms about answers follow from, over the first turns of an iteration's episodes.

    answer_tokens: mean number of sampled tokens. answers_repeated: of an agent's distinct observations, the largest fraction to
    which it gave one and the same answer; the largest over agents; absent with fewer than `FEWEST_TASKS` observations.
    answers_rejected: the environment's metric `rejected` per part of the answers (`TextEnv.num_parts`, at least 1 of each
    answer); absent without this metric or if the number of parts is unknown.
    """
    turns = [(episode, episode.turns[0]) for episode in episodes if episode.turns and not episode.failure]
    answers = [answer for _, turn in turns for answer in turn.completions.values()]
    if not answers:
        return {}
    metrics = {"answer_tokens": sum(len(a.token_ids) for a in answers if a.token_ids is not None) / len(answers)}
    given: dict[str, dict[str, set[str]]] = {}
    for _, turn in turns:
        for agent, answer in turn.completions.items():
            given.setdefault(agent, {}).setdefault(turn.observations[agent], set()).add(answer.text.strip())
    shares = [
        max(Counter(text for texts in by_task.values() for text in texts).values()) / len(by_task)
        for by_task in given.values()
        if len(by_task) >= FEWEST_TASKS
    ]
    if shares:
        metrics["answers_repeated"] = max(shares)
    after = [(e.turns[1].metrics if len(e.turns) > 1 else e.metrics).get("rejected") for e, _ in turns]
    if numbers := [number for number in after if number is not None]:
        num_parts = getattr(env, "num_parts", lambda answer: None)
        parts = [count for answer in answers if (count := num_parts(answer.text)) is not None]
        if len(parts) == len(answers):
            metrics["answers_rejected"] = sum(numbers) / sum(max(1, count) for count in parts)
    return metrics
