"""Creates the engine of a config."""

from __future__ import annotations

from collm.engines.base import Engine
from collm.engines.local import LocalEngine
from collm.models.team import Team
from collm.settings.rooms import RolloutSettings


def make_engine(team: Team, rollout: RolloutSettings) -> Engine:
    """The engine of `rollout.engine`, with the team's present weights. Raises ConfigError if it is not available."""
    if rollout.engine == "vllm":
        from collm.engines.vllm import VllmEngine

        return VllmEngine(team, rollout.vllm)
    return LocalEngine(team, batch_tokens=rollout.batch_tokens, remember=True)
