"""Algorithms by name. An algorithm is a value: a return, a baseline, a critic and a loss; there is one trainer."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named algorithm: the settings of the rooms [algorithm] and [critic] that its name stands for."""

    about: str
    """One sentence for `collm algorithms`."""
    algorithm: dict[str, Any]
    """Settings of [algorithm]."""
    critic: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of [critic]; empty without a critic."""

    def settings(self) -> dict[str, Any]:
        """{"room.key": value} of both rooms."""
        rooms = {"algorithm": self.algorithm, "critic": self.critic}
        return {f"{room}.{key}": value for room, values in rooms.items() for key, value in values.items()}


def _monte_carlo(about: str, baseline: str) -> Preset:
    return Preset(about, {"group_size": 4, "baseline": baseline})


MAX_DROP = 0.03
"""With it a team that has solved its task stays solved (docs/results/stability)."""

ALGORITHMS = {
    "collm-cc": Preset(
        "one centralized critic of numbers in the joint history (arXiv:2601.21972); TD error minus a difference baseline",
        {"baseline": "value", "teammates": "replay", "max_drop": MAX_DROP},
        {"reads": "joint", "body": "none", "lam": 0.9, "metrics": "auto"},
    ),
    "collm-cc-paper": Preset(
        "the setting of arXiv:2601.21972: a critic that reads text alone, TD error z-scored per agent",
        {"baseline": "value", "normalize": "agent"},
        {"reads": "joint"},
    ),
    "collm-dc": Preset(
        "a decentralized critic per agent, which reads that agent's history and nothing else; TD(lambda)",
        {"baseline": "value", "lam": 0.9, "max_drop": MAX_DROP},
        {"reads": "own", "body": "none", "lam": 0.9, "metrics": "auto"},
    ),
    "magrpo": _monte_carlo("return minus the mean of a task's siblings (arXiv:2508.04652)", "group_mean"),
    "marloo": _monte_carlo("return minus the mean of the other siblings (arXiv:2402.14740)", "leave_one_out"),
    "maremax": _monte_carlo("return minus the group's best; a biased baseline", "group_max"),
    "mareinforce": _monte_carlo("return without a baseline", "none"),
    "ac": Preset(
        "one agent and its critic; TD(lambda)",
        {"baseline": "value", "lam": 0.9, "max_drop": MAX_DROP},
        {"reads": "joint", "body": "none", "lam": 0.9, "metrics": "readings"},
    ),
    "grpo": _monte_carlo("magrpo with one agent (arXiv:2402.03300)", "group_mean"),
}

CRITIC_BASELINES = ("value", "counterfactual")
GROUP_BASELINES = ("group_mean", "leave_one_out", "group_max")
BASELINES = (*CRITIC_BASELINES, *GROUP_BASELINES, "none")
"""Built-in values of algorithm.baseline; "module:function" is a user-defined group baseline."""
