"""The difference baseline in a bandit whose gradient is enumerated: two agents, two answers each, batches of two episodes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from collm.learning import critics, residual
from collm.learning.batch import Batch
from collm.learning.credit import assign_returns, assign_values
from collm.learning.residual import Regressions
from collm.settings.rooms import AlgorithmSettings
from collm.types import Completion, Counterfactual, Episode, Group, Turn

TEAM = ("a", "b")
LINES = {"a": ("fill a1", "fill a2\nfill a3"), "b": ("fill b1", "fill b2\nfill b3")}
CELLS = {"fill a1": 0, "fill a2": 1, "fill a3": 2, "fill b1": 6, "fill b2": 7, "fill b3": 8}
"""The cell of a 3 x 3 drawing that each line fills."""
REWARD = ((1.0, 4.0), (0.5, 3.0))
"""Of a's and b's answer; b's answer is what most of it comes from, and an answer of a is worth more beside b's first."""
POLICY = {"a": (0.3, 0.7), "b": (0.6, 0.4)}
MAKERS = [("replay", "global"), ("replay", "readings"), ("effects", "readings")]


def drawing(answers: tuple[str, ...]) -> str:
    cells = list("." * 9)
    for line in "\n".join(answers).split("\n"):
        if line in CELLS:
            cells[CELLS[line]] = "#"
    return "\n".join("".join(cells[row : row + 3]) for row in (0, 3, 6))


def played(one: int, other: int) -> Episode:
    """A turn from the empty drawing, with both no-op counterfactuals as the environment would replay them."""
    answers = {"a": LINES["a"][one], "b": LINES["b"][other]}
    completions = {agent: Completion(agent, text, (), torch.zeros(0).numpy()) for agent, text in answers.items()}
    turn = Turn(dict.fromkeys(TEAM, drawing(())), completions, REWARD[one][other], REWARD[one][other])
    for agent, left in (("a", answers["b"]), ("b", answers["a"])):
        shown = drawing((left,))
        turn.no_op[agent] = Counterfactual(0.0, 0.0, {"filled": float(shown.count("#"))}, dict.fromkeys(TEAM, shown))
    after = drawing(tuple(answers.values()))
    metrics = {"filled": float(after.count("#"))}
    return Episode(0, 0, TEAM, dict.fromkeys(TEAM, after), [turn], terminated=True, metrics=metrics)


def assign(regressions: Regressions, baseline: str, *joint: tuple[int, int]) -> torch.Tensor:
    """(E, N) advantages of one turn."""
    batch = Batch.of([Group(0, [played(*answers) for answers in joint])], TEAM)
    settings = AlgorithmSettings(baseline=baseline, gamma=1.0, group_size=2)
    if baseline != "value":
        return assign_returns(batch, settings, regressions).credit.advantages_ENT[..., 0]
    wanted_ENT = critics.targeted(batch, kind="V", own_turns=False)
    text = critics.without_text(batch)
    assigned = assign_values(batch, text, wanted_ENT, regressions, {"critic": "a"}, settings, critic_lam=1.0)
    return assigned.credit.advantages_ENT[..., 0]


def trained(baseline: str, maker: str, read: str) -> Regressions:
    """Regressions that have learned from a few iterations of all joint answers."""
    has_critic, changes = baseline == "value", read if maker != "none" else None
    regressions = Regressions(
        {"team": TEAM},
        ("filled",),
        critic=has_critic,
        returns=read if has_critic else None,
        changes=changes,
        effects=maker == "effects",
    )
    for _ in range(6):
        assign(regressions, baseline, *[*itertools.product(range(2), repeat=2)] * 2)
    return regressions


def expected(regressions: Regressions, baseline: str) -> tuple[torch.Tensor, float]:
    """Gradient (2,) of a's logits over all 16 batches of two episodes, and the second moment of a's advantages."""
    gradient, moment = torch.zeros(2, dtype=torch.float64), 0.0
    for joint in itertools.product(itertools.product(range(2), repeat=2), repeat=2):
        chance = 1.0
        for one, other in joint:
            chance *= POLICY["a"][one] * POLICY["b"][other]
        advantages_E = assign(copy.deepcopy(regressions), baseline, *joint)[:, 0].double()
        for (one, _), advantage in zip(joint, advantages_E, strict=True):
            score = torch.eye(2, dtype=torch.float64)[one] - torch.tensor(POLICY["a"], dtype=torch.float64)
            gradient += chance * advantage * score / 2
            moment += chance * advantage.item() ** 2 / 2
    return gradient, moment


@pytest.mark.parametrize("baseline", ["value", "group_mean", "leave_one_out"])
@pytest.mark.parametrize(("maker", "read"), MAKERS)
def test_it_leaves_the_expected_gradient_as_it_is(baseline: str, maker: str, read: str) -> None:
    plain, before = expected(trained(baseline, "none", read), baseline)
    with_it, after = expected(trained(baseline, maker, read), baseline)
    assert plain.abs().min() > 0.05
    assert torch.allclose(plain, with_it, atol=1e-5)
    assert after < 0.9 * before


@pytest.mark.parametrize("baseline", ["value", "group_mean"])
@pytest.mark.parametrize(("maker", "read"), MAKERS)
def test_one_that_reads_the_own_answer_does_not(monkeypatch: pytest.MonkeyPatch, baseline: str, maker: str, read: str) -> None:
    """The wrong variant: the turn as it was played."""

    def outcomes(self: Any, batch: Batch, agent: str) -> dict[tuple[int, int], Counterfactual]:
        return {(n, 0): Counterfactual(0.0, 0.0, e.metrics, e.observations) for n, e in enumerate(batch.episodes)}

    monkeypatch.setattr(Regressions, "without", outcomes)
    plain, _ = expected(trained(baseline, "none", read), baseline)
    with_it, _ = expected(trained(baseline, maker, read), baseline)
    assert (plain - with_it).abs().max() > 0.02


def test_effects_give_what_the_environment_replays() -> None:
    """With learned effects the difference baseline reads the same text as with replays."""
    regressions = trained("group_mean", "effects", "readings")
    batch = Batch.of([Group(0, [played(1, 1), played(0, 1)])], TEAM)
    for agent in TEAM:
        predicted, real = regressions.without(batch, agent), residual.replayed(batch, agent)
        assert {at: o.observations for at, o in predicted.items()} == {at: o.observations for at, o in real.items()}


def test_effects_are_known_from_earlier_iterations_alone() -> None:
    """In the first iteration no line has an effect: nothing is subtracted, though the turn itself would tell."""
    fresh = Regressions({"team": TEAM}, (), critic=False, changes="readings", effects=True)
    batch = Batch.of([Group(0, [played(1, 1), played(0, 1)])], TEAM)
    assert {o.observations["a"] for o in fresh.without(batch, "a").values()} == {drawing(())}
    plain = [[0.25, 0.25], [-0.25, -0.25]]
    assert assign(fresh, "group_mean", (0, 0), (1, 0)).tolist() == plain
    assert {o.observations["a"] for o in fresh.without(batch, "b").values()} != {drawing(())}
