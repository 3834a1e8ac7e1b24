"""The smallest change of settings with which a recipe fits, found by trying."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from collm.errors import ConfigError
from collm.planning.memory import Plan, plan
from collm.planning.work import Work, work_of
from collm.settings.load import apply_overrides, parse_config
from collm.settings.rooms import Config

SAME = {"learner.micro_batch_tokens", "rollout.batch_tokens", "learner.gradient_checkpointing"}
"""Settings that change memory and time but not results."""


def remedies(config: Config, longest: int) -> Iterator[dict[str, Any]]:
    """Settings that lower the peak, the smallest change first. Those of `SAME` come first."""
    tokens = config.learner.micro_batch_tokens
    while tokens // 2 >= longest:
        tokens //= 2
        yield {"learner.micro_batch_tokens": tokens}
    batch = config.rollout.batch_tokens
    while batch // 2 >= longest:
        batch //= 2
        yield {"rollout.batch_tokens": batch}
    if not config.learner.gradient_checkpointing:
        yield {"learner.gradient_checkpointing": True}
    if config.team.compute != "bfloat16":
        yield {"team.compute": "bfloat16"}
    if config.team.lora is None:
        yield {"team.lora.rank": 16}


def advise(
    config: Config, limit: float, plans: Callable[[Config, Work], Sequence[Plan]] = lambda config, work: [plan(config, work)]
) -> tuple[dict[str, Any], Plan] | None:
    """The fewest remedies that bring the peak to at most `limit` bytes, and the plan with them; None if no set of them does.

    plans: those whose peaks count; default: that of one process.
    """
    work = work_of(config)
    longest = max(work.sequence(agent) for agent in work.agents)

    def largest(overrides: Mapping[str, Any]) -> Plan:
        return max(plans(with_settings(config, overrides), work), key=lambda found: found.peak)

    taken: dict[str, Any] = {}
    for remedy in remedies(config, longest):
        if (found := largest(remedy)).peak <= limit:
            return remedy, found
        taken |= remedy
        if largest(taken).peak <= limit:
            for name in list(taken):
                fewer = {key: value for key, value in taken.items() if key != name}
                try:
                    if largest(fewer).peak <= limit:
                        taken = fewer
                except ConfigError:
                    continue  # another remedy requires this one
            return taken, largest(taken)
    return None


def with_settings(config: Config, overrides: Mapping[str, Any]) -> Config:
    """The config with other values of some settings. Raises ConfigError where they do not fit the others."""
    values = config.model_dump(mode="json", exclude_none=True)
    apply_overrides(values, overrides)
    return parse_config(values)
