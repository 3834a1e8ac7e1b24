"""Warnings about metrics that indicate degenerate answers or a mismatch between engine and learner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LARGE_GAP = 0.05
"""Limit, in nats, of the mean difference per token between the engine's and the learner's log-probs; above it the two
compute different policies."""


def alarms(summary: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> warning about degenerate answers; an environment without the metric has no warning."""
    found = {}
    for name, below, limit, meaning in ALARMS:
        mean = summary.get(f"evaluation/{name}")
        if isinstance(mean, float) and (mean < limit if below else mean > limit):
            found[name] = (
                f"warning: held-out {name} is {mean:.2f}, {'below' if below else 'above'} {limit}: {meaning}, "
                "whatever the reward is. Read some answers (collm report)."
            )
    return found


ALARMS = (
    ("repetition", False, 0.5, "answers repeat themselves"),
    ("source_overlap", False, 0.9, "answers copy their source"),
    ("source_words", True, 0.1, "answers have nothing to do with their source"),
)
"""(metric, whether low values are bad, limit, meaning)."""


def gaps(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Metric -> warning about an agent whose engine samples from another distribution than the learner scores."""
    found = {}
    for name, value in metrics.items():
        if name.endswith("/logprob_gap_mean") and value > LARGE_GAP:
            agent = name.removesuffix("/logprob_gap_mean")
            found[name] = (
                f"warning: the engine's log-probs of {agent} differ from the learner's by {value:.3f} nats per token (limit "
                f"{LARGE_GAP}): it answers with other weights, or in another number format, than are trained. Set "
                "team.compute='float32', or see whether Engine.load takes new weights."
            )
    return found
