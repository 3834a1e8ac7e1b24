"""collm: multi-agent actor-critic for decentralized teams of language models.

Names are loaded on first use, so that importing collm (and `collm --help`) does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collm.envs.catalogue import make
    from collm.envs.check import check_env
    from collm.models.team import Team
    from collm.rollout.collect import collect
    from collm.rollout.plan import Plan
    from collm.runs.open import open_run
    from collm.settings.load import load_config
    from collm.settings.rooms import Config
    from collm.studies.compare import compare
    from collm.studies.fidelity import fidelity
    from collm.training.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Config": "collm.settings.rooms",
    "load_config": "collm.settings.load",
    "make": "collm.envs.catalogue",
    "check_env": "collm.envs.check",
    "Team": "collm.models.team",
    "Plan": "collm.rollout.plan",
    "collect": "collm.rollout.collect",
    "open_run": "collm.runs.open",
    "compare": "collm.studies.compare",
    "fidelity": "collm.studies.fidelity",
    "Trainer": "collm.training.trainer",
}

__all__ = [
    "Config",
    "Plan",
    "Team",
    "Trainer",
    "check_env",
    "collect",
    "compare",
    "fidelity",
    "load_config",
    "make",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'collm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
