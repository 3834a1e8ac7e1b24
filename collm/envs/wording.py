"""The two wordings of the built-in environments' observations.

"plain" is for models that were never trained on the task: the task's text first, one imperative last, which names the beginning
of an answer and gives one example. "terse" is the wording that the shipped `tiny` model was pre-trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from collm.errors import EnvError

Wording = Literal["plain", "terse"]


@dataclass(frozen=True, slots=True)
class Texts:
    """The observations of one environment in one wording, as functions of the environment.

    Example: Texts(first=_rules, later=_feedback); self.wording.first(self, "agent_0") is agent_0's first observation.
    """

    first: Callable[..., str]
    """(environment, agent) -> the first observation of an agent."""
    later: Callable[..., str]
    """(environment, agent, ...) -> the observation of an agent after a turn; further arguments are the turn's results."""


def texts_of(wording: str, plain: Texts, terse: Texts) -> Texts:
    """The texts of one wording. Raises EnvError for an unknown one."""
    known = {"plain": plain, "terse": terse}
    if wording not in known:
        raise EnvError(f"wording={wording!r} is not one of {', '.join(known)}.")
    return known[wording]
