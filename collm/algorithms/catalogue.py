"""Maps names in settings to formulas."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from collm.algorithms import advantages, losses
from collm.errors import ConfigError

GROUP_ESTIMATORS: dict[str, advantages.GroupEstimator] = {
    "group_mean": advantages.group_mean,
    "leave_one_out": advantages.leave_one_out,
    "group_max": advantages.group_max,
    "none": advantages.no_baseline,
}

PolicyLoss = Callable[..., tuple[Tensor, losses.Stats]]
CLIPPED_LOSSES: dict[str, PolicyLoss] = {"ppo_clip": losses.ppo_clip, "sequence_clip": losses.sequence_clip}


def group_estimator(baseline: str) -> advantages.GroupEstimator:
    """The estimator, from returns of siblings to their advantages, of a value of `algorithm.baseline`.

    "module:function" is a user-defined baseline: `function(returns_G: Tensor) -> Tensor` receives the returns of siblings along
    the first dimension, (G, T) for whole episodes or (G,) at a node of a turn tree. It returns the baseline to subtract, in the
    same shape. Raises ConfigError if it cannot be imported or is not such a function.
    """
    if baseline in GROUP_ESTIMATORS:
        return GROUP_ESTIMATORS[baseline]
    function = load(baseline, "algorithm.baseline", "baseline", Tensor, "function(returns_G: Tensor)")

    def estimate(returns_G: Tensor) -> Tensor:
        baseline_G = function(returns_G)
        if baseline_G.shape != returns_G.shape:
            raise ConfigError(
                f"algorithm.baseline={baseline!r} returned a tensor of shape {tuple(baseline_G.shape)} for returns of shape "
                f"{tuple(returns_G.shape)}. Return one number per return."
            )
        return (returns_G - baseline_G).to(returns_G)

    estimate(torch.zeros(4, 2))  # fail before training begins
    return estimate


def load(name: str, setting: str, kind: str, returned: Any, call: str) -> Any:
    """Import the "module:function" of a setting. Its return annotation must be `returned`, so that a recipe cannot call
    arbitrary functions. `kind` and `call`, the function with its arguments, are for the message."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
        annotated = get_type_hints(function).get("return")
    except (ImportError, AttributeError, TypeError, NameError, ValueError) as error:
        raise ConfigError(
            f"{setting}={name!r} cannot be loaded: {error}. Write 'module:function' of a module that Python finds "
            "here (PYTHONPATH)."
        ) from error
    if annotated != returned:
        written = returned.__name__ if isinstance(returned, type) else str(returned)
        raise ConfigError(
            f"{setting}={name!r} is not a {kind}: it must be a function with the annotation `-> {written}`. Write "
            f"`def {call} -> {written}`."
        )
    return function
