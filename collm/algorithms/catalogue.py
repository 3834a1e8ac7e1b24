"""Names of the formulas that settings refer to."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from collm.algorithms import advantages, losses

GROUP_ESTIMATORS: dict[str, advantages.GroupEstimator] = {
    "group_mean": advantages.group_mean,
    "leave_one_out": advantages.leave_one_out,
    "group_max": advantages.group_max,
    "return": advantages.no_baseline,
}

PolicyLoss = Callable[..., tuple[Tensor, losses.Stats]]
CLIPPED_LOSSES: dict[str, PolicyLoss] = {"ppo_clip": losses.ppo_clip, "sequence_clip": losses.sequence_clip}
