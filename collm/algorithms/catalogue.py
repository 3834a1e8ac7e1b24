"""Names of the formulas that settings refer to."""

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
    """What turns the returns of siblings into advantages under a value of `algorithm.baseline`.

    "module:function" is a baseline of the user's own: `function(returns_G: Tensor) -> Tensor` gets the returns of siblings
    along the first dimension, (G, T) of whole episodes or (G,) at a node of a turn tree, and returns what is subtracted from
    them, in the same shape. Raises ConfigError where it cannot be imported, or is not such a function.
    """
    if baseline in GROUP_ESTIMATORS:
        return GROUP_ESTIMATORS[baseline]
    function = _load(baseline)

    def estimate(returns_G: Tensor) -> Tensor:
        baseline_G = function(returns_G)
        if baseline_G.shape != returns_G.shape:
            raise ConfigError(
                f"algorithm.baseline={baseline!r} returned a tensor of shape {tuple(baseline_G.shape)} for returns of shape "
                f"{tuple(returns_G.shape)}. Return one number per return."
            )
        return (returns_G - baseline_G).to(returns_G)

    estimate(torch.zeros(4, 2))  # a mistake shows before anything is trained
    return estimate


def _load(name: str) -> Any:
    """The function behind "module:function". Its return annotation must be Tensor: a recipe cannot call any function it
    likes."""
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
        returned = get_type_hints(function).get("return")
    except (ImportError, AttributeError, TypeError, NameError) as error:
        raise ConfigError(
            f"algorithm.baseline={name!r} cannot be loaded: {error}. Write 'module:function' of a module that Python finds "
            "here (PYTHONPATH)."
        ) from error
    if returned is not Tensor:
        raise ConfigError(
            f"algorithm.baseline={name!r} is not a baseline: it must be a function with the annotation `-> Tensor`. Write "
            "`def function(returns_G: Tensor) -> Tensor`."
        )
    return function
