"""Estimators against hand-derived values, identities between them, and the wrong variants."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from learners import critic_parts

from collm.algorithms import advantages as A
from collm.algorithms.catalogue import GROUP_ESTIMATORS
from collm.models.policy import Policy
from collm.models.team import Team
from collm.settings.load import parse_config
from collm.training.assemble import make_learner
from collm.types import Annotation, Completion, Counterfactual, Episode, Group, Sampling, Turn


def close(left, right, tolerance=1e-12):
    return torch.allclose(torch.as_tensor(left).double(), torch.as_tensor(right).double(), rtol=0, atol=tolerance)


def row(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


REWARDS = row(1, 2, 3)
TERMINATED = row(0.5, 1.0, 1.5, 0.0)
TRUNCATED = row(0.5, 1.0, 1.5, 4.0)
LIVE = torch.ones(3, dtype=torch.float64)


# gamma = 0.5, terminated: deltas are 1 + 0.5*1 - 0.5 = 1, 2 + 0.5*1.5 - 1 = 1.75, 3 + 0 - 1.5 = 1.5.
# lam 0.5 (factor 0.25): A2 = 1.5, A1 = 1.75 + 0.375 = 2.125, A0 = 1 + 0.53125. lam 1 (0.5): 1.5, 1.75 + 0.75, 1 + 1.25.
# Truncated with V = 4 after the end: only the last delta changes, 3 + 0.5*4 - 1.5 = 3.5.
@pytest.mark.parametrize(
    ("values", "lam", "expected"),
    [
        (TERMINATED, 0.0, (1.0, 1.75, 1.5)),
        (TERMINATED, 0.5, (1.53125, 2.125, 1.5)),
        (TERMINATED, 1.0, (2.25, 2.5, 1.5)),
        (TRUNCATED, 0.0, (1.0, 1.75, 3.5)),
        (TRUNCATED, 0.5, (1.65625, 2.625, 3.5)),
        (TRUNCATED, 1.0, (2.75, 3.5, 3.5)),
    ],
)
def test_td_lambda_by_hand(values, lam, expected):
    assert close(A.td_lambda(REWARDS, values, LIVE, gamma=0.5, lam=lam), row(*expected))


def test_mishandled_truncation_is_another_number():
    for lam in (0.5, 1.0):
        right = A.td_lambda(REWARDS, TRUNCATED, LIVE, gamma=0.5, lam=lam)
        wrong = A.td_lambda(REWARDS, TERMINATED, LIVE, gamma=0.5, lam=lam)
        assert (right - wrong > 0.1).all()
    right = A.td_lambda(REWARDS, TRUNCATED, LIVE, gamma=0.5, lam=0.0)
    assert close(right - A.td_lambda(REWARDS, TERMINATED, LIVE, gamma=0.5, lam=0.0), row(0, 0, 2))  # gamma * V only at the end


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_constant_reward_without_values_sums_a_geometric_series(gamma):
    T = 6
    got = A.td_lambda(torch.ones(T).double(), torch.zeros(T + 1).double(), torch.ones(T), gamma=gamma, lam=1.0)
    for t in range(T):
        series = float(T - t) if gamma == 1 else (1 - gamma ** (T - t)) / (1 - gamma)
        assert got[t].item() == pytest.approx(series, abs=1e-12)


def test_nothing_after_the_end_of_an_episode_counts():
    # Two live turns out of four; rewards and values past the entry that follows the last live turn are arbitrary.
    live = row(1, 1, 0, 0)
    for after, expected in ((0.0, (1 + 0.5 * 1 - 0.5 + 0.5 * (2 - 1), 1.0)), (6.0, (1.0 + 0.5 * 4, 4.0))):
        for junk in (0.0, 1e6):
            got = A.td_lambda(row(1, 2, junk, junk), row(0.5, 1, after, junk, junk), live, gamma=0.5, lam=1.0)
            assert close(got, row(*expected, 0, 0))
            target = A.lambda_returns(row(1, 2, junk, junk), row(0.5, 1, after, junk, junk), live, gamma=0.5, lam=1.0)
            assert close(target, row(expected[0] + 0.5, expected[1] + 1, 0, 0))


def test_td_lambda_treats_every_row_alone():
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 2, 5).double(), torch.randn(3, 2, 6).double()
    live = (torch.arange(5) < torch.tensor([[5], [3], [1]]))[:, None].expand(3, 2, 5).double()
    whole = A.td_lambda(rewards, values, live, gamma=0.9, lam=0.7)
    for e, n in itertools.product(range(3), range(2)):
        assert close(whole[e, n], A.td_lambda(rewards[e, n], values[e, n], live[e, n], gamma=0.9, lam=0.7))


def test_td_lambda_is_the_weighted_mean_of_n_step_advantages():
    """A = (1 - lam) sum_n lam^(n-1) A^(n) + lam^(T-1) A^(T), with A^(n) = n discounted rewards + gamma^n V - V (1506.02438)."""
    torch.manual_seed(1)
    T, gamma, lam = 5, 0.8, 0.6
    r, v = torch.randn(T).double(), torch.randn(T + 1).double()
    n_step = [sum(gamma**k * r[k] for k in range(n)) + gamma**n * v[n] - v[0] for n in range(1, T + 1)]
    mixed = (1 - lam) * sum(lam ** (n - 1) * n_step[n - 1] for n in range(1, T)) + lam ** (T - 1) * n_step[-1]
    assert close(A.td_lambda(r, v, torch.ones(T).double(), gamma=gamma, lam=lam)[0], mixed)


def test_values_are_only_a_potential():
    """With lam = 1 the values telescope: rewards shaped by them, judged by V = 0, give the same advantages."""
    torch.manual_seed(2)
    r, v = torch.randn(4).double(), torch.randn(5).double()
    shaped = r + 0.9 * v[1:] - v[:-1]
    for lam in (0.0, 0.4, 1.0):
        plain = A.td_lambda(r, v, torch.ones(4).double(), gamma=0.9, lam=lam)
        assert close(A.td_lambda(shaped, torch.zeros(5).double(), torch.ones(4).double(), gamma=0.9, lam=lam), plain)


def test_targets_by_hand():
    # One step: 1 + 0.5*1, 2 + 0.5*1.5, 3. Returns: 3, 2 + 1.5, 1 + 1.75. lam 0.5: advantages above plus V.
    for lam, expected in ((0.0, (1.5, 2.75, 3.0)), (1.0, (2.75, 3.5, 3.0)), (0.5, (2.03125, 3.125, 3.0))):
        assert close(A.lambda_returns(REWARDS, TERMINATED, LIVE, gamma=0.5, lam=lam), row(*expected))
    assert close(A.discounted_returns(REWARDS, gamma=0.5), row(2.75, 3.5, 3.0))
    assert close(A.discounted_returns(REWARDS[None], gamma=0.0), REWARDS[None])


# --- groups --------------------------------------------------------------------------------------------------------------

RETURNS = row(0.1, 2, -1, 0.7)


# Mean 1.8 / 4 = 0.45. Means of the others: (2 - 1 + 0.7)/3 = 0.5667, (0.1 - 1 + 0.7)/3 = -0.0667, 2.8/3, 1.1/3. Best 2.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_mean", (-0.35, 1.55, -1.45, 0.25)),
        ("leave_one_out", (0.1 - 1.7 / 3, 2 + 0.2 / 3, -1 - 2.8 / 3, 0.7 - 1.1 / 3)),
        ("group_max", (-1.9, 0.0, -3.0, -1.3)),
        ("none", (0.1, 2.0, -1.0, 0.7)),
    ],
)
def test_group_estimators_by_hand(name, expected):
    assert close(GROUP_ESTIMATORS[name](RETURNS), row(*expected))


def test_the_four_group_estimators_are_four():
    results = [estimator(RETURNS) for estimator in GROUP_ESTIMATORS.values()]
    assert len(results) == 4
    for left, right in itertools.combinations(results, 2):
        assert (left - right).abs().max() > 0.05


@pytest.mark.parametrize("G", [2, 3, 4, 8])
def test_identities_of_group_estimators(G):
    torch.manual_seed(G)
    returns = torch.randn(G, 3).double()  # several turns at once: siblings lie along the first dimension
    assert close(A.leave_one_out(returns), A.group_mean(returns) * G / (G - 1))
    assert close(A.group_mean(returns).sum(0), torch.zeros(3))
    assert close(A.group_max(returns).amax(0), torch.zeros(3))
    assert (A.group_max(returns) <= 0).all()
    for name in ("group_mean", "leave_one_out", "group_max"):
        assert close(GROUP_ESTIMATORS[name](returns + 5), GROUP_ESTIMATORS[name](returns))  # a constant reward changes nothing
        for t in range(3):
            assert close(GROUP_ESTIMATORS[name](returns)[:, t], GROUP_ESTIMATORS[name](returns[:, t]))


def test_only_leave_one_out_and_no_baseline_are_unbiased():
    """An unbiased baseline does not move with the own return: dA_g / dR_g = 1. The mean moves by 1/G, the best with its own."""
    for name, slope in (("leave_one_out", 1.0), ("none", 1.0), ("group_mean", 0.75), ("group_max", 0.0)):
        more = RETURNS.clone()
        more[1] += 0.5  # the best one
        change = (GROUP_ESTIMATORS[name](more) - GROUP_ESTIMATORS[name](RETURNS))[1]
        assert change.item() == pytest.approx(0.5 * slope, abs=1e-12)


def test_no_baseline_gives_a_copy():
    returns = RETURNS.clone()
    A.no_baseline(returns).mul_(0)
    assert close(returns, RETURNS)


# --- turn trees ----------------------------------------------------------------------------------------------------------

# An uneven tree, gamma 0.5: node (0,) goes on, (1,) ends at once; (0, 1) ends at the second turn.
# R(0,0,0) = 4, R(0,0,1) = 8, R(0,0) = 2 + 0.5*6 = 5, R(0,1) = 6, R(0,) = 1 + 0.5*5.5 = 3.75, R(1,) = 3.
# (The mean over leaves instead of children would give R(0,) = 1 + 0.5 * mean(4, 6, 6) = 3.667.)
LEAVES = {(0, 0, 0): [1.0, 2.0, 4.0], (0, 0, 1): [1.0, 2.0, 8.0], (0, 1): [1.0, 6.0], (1,): [3.0]}
TREE = {(0,): 3.75, (1,): 3.0, (0, 0): 5.0, (0, 1): 6.0, (0, 0, 0): 4.0, (0, 0, 1): 8.0}


def test_tree_returns_by_hand_in_any_order():
    for paths in itertools.permutations(LEAVES):
        returns = A.tree_returns([LEAVES[path] for path in paths], list(paths), gamma=0.5)
        assert set(returns) == set(TREE)
        assert all(returns[node] == pytest.approx(TREE[node], abs=1e-12) for node in TREE)


def test_tree_returns_of_a_single_line_are_discounted_returns():
    returns = A.tree_returns([[1.0, 2.0, 3.0]], [(0, 0, 0)], gamma=0.5)
    assert [returns[(0,) * n] for n in (1, 2, 3)] == [2.75, 3.5, 3.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("group_mean", {(0,): 0.375, (1,): -0.375, (0, 0): -0.5, (0, 1): 0.5, (0, 0, 0): -2, (0, 0, 1): 2}),
        ("leave_one_out", {(0,): 0.75, (1,): -0.75, (0, 0): -1, (0, 1): 1, (0, 0, 0): -4, (0, 0, 1): 4}),
        ("group_max", {(0,): 0, (1,): -0.75, (0, 0): -1, (0, 1): 0, (0, 0, 0): -4, (0, 0, 1): 0}),
        ("none", TREE),
    ],
)
def test_tree_advantages_compare_siblings_of_one_node_only(name, expected):
    got = A.tree_advantages(TREE, GROUP_ESTIMATORS[name])
    assert got == {node: pytest.approx(value, abs=1e-12) for node, value in expected.items()}


@pytest.mark.parametrize("name", ["group_mean", "leave_one_out", "group_max"])
def test_an_only_child_has_nothing_to_compare(name):
    """A sibling's failure leaves an only child: its advantage is 0, never a number that is not one."""
    assert A.tree_advantages({(0,): 3.0, (0, 0): 1.0, (0, 1): 2.0}, GROUP_ESTIMATORS[name])[(0,)] == 0.0


# --- counterfactual, normalization ---------------------------------------------------------------------------------------


def test_counterfactual_by_hand():
    taken = torch.tensor([3.0, 1.0])
    others = torch.tensor([[1.0, 2.0, 6.0], [0.0, -1.0, -2.0]])  # means 3 and -1
    assert close(A.counterfactual(taken, others), [0.0, 2.0])
    assert close(A.counterfactual(taken, taken[:, None].expand(2, 4)), [0.0, 0.0])
    # The baseline excludes the answer taken: with it the second would be 1 - (1 + 0 - 1 - 2)/4 = 1.5.
    assert not close(A.counterfactual(taken, others)[1], 1.5)


def test_normalize_by_hand():
    # Live: 1, 3, -2. Mean 2/3, variance (1/9 + 49/9 + 64/9)/3 = 38/9.
    advantages, live = row(1, 3, 99, -2)[None], row(1, 1, 0, 1)[None]
    deviation = (38 / 9) ** 0.5
    got = A.normalize(advantages, live, recentre=False)
    assert close(got, row(1 / deviation, 3 / deviation, 99, -2 / deviation)[None])
    got = A.normalize(advantages, live, recentre=True)
    third = 1 / 3
    assert close(got, row(third / deviation, 7 * third / deviation, 99, -8 * third / deviation)[None])


def test_recentring_merges_the_group_methods_and_scaling_does_not():
    """Without recentring three directions remain; leave-one-out is a multiple of group_mean, so scaling makes those two one."""
    live = torch.ones(4, 1).double()
    scaled = {k: A.normalize(f(RETURNS)[:, None], live, recentre=False) for k, f in GROUP_ESTIMATORS.items()}
    scored = {k: A.normalize(f(RETURNS)[:, None], live, recentre=True) for k, f in GROUP_ESTIMATORS.items()}
    for left, right in itertools.combinations(("group_mean", "group_max", "none"), 2):
        assert (scaled[left] - scaled[right]).abs().max() > 0.3
    for left, right in itertools.combinations(GROUP_ESTIMATORS, 2):
        assert close(scored[left], scored[right])
    assert close(scaled["group_mean"], scaled["leave_one_out"])


def test_normalization_is_over_the_whole_iteration_not_over_an_episode():
    advantages = row(1, -1, 10, -10).view(2, 2)
    got = A.normalize(advantages, torch.ones(2, 2), recentre=False)
    assert got[1, 0] / got[0, 0] == pytest.approx(10.0)


def test_normalize_leaves_a_single_answer_and_a_constant_batch_undivided():
    assert close(A.normalize(row(5)[None], row(1)[None], recentre=True), row(5)[None])
    assert close(A.normalize(row(5, 7)[None], row(0, 1)[None], recentre=True), row(5, 7)[None])
    assert close(A.normalize(row(5, 5)[None], row(1, 1)[None], recentre=False), row(5, 5)[None])


CONSTANTS = (0.1, 1 / 3, 0.7, 9.7, 123.456)


def test_zscoring_a_constant_batch_gives_no_signal_from_rounding():
    """Equal float32 advantages have a deviation of about 1e-8 by rounding alone; dividing by it invents unit advantages."""
    worst = max(
        (A.normalize(torch.full((1, size), number), torch.ones(1, size), recentre=True).abs().max().item(), size, number)
        for size, number in itertools.product(range(2, 40), CONSTANTS)
    )
    assert worst[0] < 1e-3, worst


def test_normalizing_solved_groups_gives_no_signal_from_rounding():
    """Every group agrees on its return, so there is nothing to learn; group_mean leaves rounding errors of 1e-8 to 1e-7."""
    for G in range(2, 12):
        advantages = torch.stack([A.group_mean(torch.full((G,), number)) for number in CONSTANTS])
        assert A.normalize(advantages, torch.ones(advantages.shape), recentre=False).abs().max() < 1e-3, G


def test_group_std_by_hand():
    # Variance of the returns around 0.45: (0.1225 + 2.4025 + 2.1025 + 0.0625)/4 = 1.1725.
    deviation = 1.1725**0.5
    for estimator in GROUP_ESTIMATORS.values():
        assert close(A.group_std(estimator(RETURNS), RETURNS), estimator(RETURNS) / deviation)
    two = torch.stack([RETURNS, 10 * RETURNS], 1)  # each turn by its own deviation
    assert close(A.group_std(A.group_mean(two), two)[:, 0], A.group_std(A.group_mean(two), two)[:, 1])


def test_group_std_of_equal_returns_stays_zero():
    """ "A group whose returns are all the same keeps its (zero) advantages": float32 rounding must not turn it into 1."""
    worst = max(
        (A.group_std(estimator(returns), returns).abs().max().item(), name, G, number)
        for G, number in itertools.product(range(2, 17), CONSTANTS)
        for name, estimator in GROUP_ESTIMATORS.items()
        if name != "none"
        for returns in [torch.full((G,), number)]
    )
    assert worst[0] < 1e-3, worst


def test_returns_that_differ_by_rounding_alone_give_no_signal():
    """The same rewards in another order sum to float32 numbers one unit in the last place apart (6e-8 at 0.7)."""
    orders = torch.tensor(list(itertools.permutations((0.1, 0.2, 0.4))))
    returns = A.discounted_returns(orders, gamma=1.0)[:, 0]
    assert 0 < returns.max() - returns.min() < 1e-6
    for advantages in (A.group_mean(returns), A.leave_one_out(returns), A.group_max(returns)):
        assert A.group_std(advantages, returns).abs().max() < 1e-3
        assert A.normalize(advantages[:, None], torch.ones(6, 1), recentre=False).abs().max() < 1e-3
    assert A.normalize(returns[:, None], torch.ones(6, 1), recentre=True).abs().max() < 1.0
    small = A.group_std(A.group_mean(RETURNS * 1e-3), RETURNS * 1e-3)  # small returns that do differ are still told apart
    assert close(small, A.group_mean(RETURNS) / 1.1725**0.5, 1e-3)


# --- as the learner uses them --------------------------------------------------------------------------------------------


def played(rewards, *, agents=("agent_0", "agent_1"), path=(), own_from=0, failure="", truncated=False):
    """An episode of one-token answers with the given rewards."""
    episode = Episode(task=0, seed=0, agents=agents, terminated=not (failure or truncated), truncated=truncated)
    episode.path, episode.own_from, episode.failure = path, own_from, failure
    for reward in rewards:
        prompt, answer = np.array([1, 80, 3, 2], dtype=np.int32), np.array([75], dtype=np.int32)
        completions = {a: Completion(a, "red", prompt, answer, np.array([-1.0], dtype=np.float32)) for a in agents}
        episode.turns.append(Turn(dict.fromkeys(agents, "?"), completions, reward, reward))
    return episode


def trained_with(tiny, episodes, **algorithm):
    """[episode][turn] -> advantage that both agents' answers were trained with, as the learner annotates the episodes."""
    config = parse_config({"env": {"name": "agree", "wording": "terse"}, "algorithm": algorithm})
    policies = [Policy(copy.deepcopy(tiny.model), tiny.tokenizer) for _ in range(2)]
    learner = make_learner(Team(dict(zip(("agent_0", "agent_1"), policies))), config, Sampling())
    said = learner.update([Group(0, episodes)], 0).annotations
    rows = [
        [
            [said.get(e, {}).get((t, agent), Annotation()).advantage for t in range(len(episode.turns))]
            for agent in episode.agents
        ]
        for e, episode in enumerate(episodes)
    ]
    assert all(ours == theirs for ours, theirs in rows)  # the reward is joint and nobody reads more than another here
    return [row[0] for row in rows]


def near(rows):
    return [[None if x is None else pytest.approx(x, abs=1e-6) for x in row] for row in rows]


def test_an_ended_sibling_counts_zero(tiny):
    # gamma 0.9. Returns-to-go: [1 + 1.8, 2] and [4, -]. Turn 0: mean 3.4. Turn 1: mean (2 + 0)/2 = 1; left out, it would be 2.
    assert trained_with(tiny, [played([1, 2]), played([4])], name="magrpo", group_size=2) == near([[-0.6, 1.0], [0.6]])
    # The best return at turn 1 is 2 and then, where going on costs, the 0 of the one that had ended.
    assert trained_with(tiny, [played([1, 2]), played([4])], name="maremax", group_size=2) == near([[-1.2, 0.0], [0.0]])
    assert trained_with(tiny, [played([1, -2]), played([4])], name="maremax", group_size=2) == near([[-4.8, -2.0], [0.0]])


def test_group_presets_are_four_algorithms_under_their_own_defaults(tiny):
    presets = {"magrpo": "group_mean", "marloo": "leave_one_out", "maremax": "group_max", "mareinforce": "none"}
    results = {}
    for name, estimator in presets.items():
        got = trained_with(tiny, [played([r]) for r in RETURNS.tolist()], name=name)
        assert got == near([[a] for a in GROUP_ESTIMATORS[estimator](RETURNS).tolist()])
        results[name] = torch.tensor(got)
    for left, right in itertools.combinations(results.values(), 2):
        assert (left - right).abs().max() > 0.05


def test_the_survivor_of_a_group_learns_nothing(tiny):
    for name in ("magrpo", "marloo", "maremax"):
        assert trained_with(tiny, [played([3.0]), played([], failure="broke")], name=name, group_size=2) == [[0.0], []], name


@pytest.mark.parametrize("name", ["magrpo", "marloo", "maremax"])
def test_the_survivor_of_a_tree_node_learns_nothing(tiny, name):
    """One failed joint action at the root leaves an only child there: nothing to compare, and no reason to stop the run."""
    leaves = [played([3.0, 1.0], path=(0, 0)), played([3.0, 2.0], path=(0, 1), own_from=1), played([], path=(1,), failure="x")]
    got = trained_with(tiny, leaves, name=name, group_size=2, tree=True)
    assert got[0][0] == 0.0
    assert got[1][1] >= 0 >= got[0][1]


def test_a_tree_through_the_learner_pays_each_joint_action_once(tiny):
    # The tree above; a leaf is trained on its own turns alone, those before own_from belong to a sibling.
    order = [(0, 0, 0), (0, 0, 1), (0, 1), (1,)]
    leaves = [played(LEAVES[p], path=p, own_from=own) for p, own in zip(order, (0, 2, 1, 0), strict=True)]
    got = trained_with(tiny, leaves, name="magrpo", group_size=2, tree=True, gamma=0.5)
    assert got == near([[0.375, -0.5, -2], [None, None, 2], [None, 0.5], [-0.375]])


def test_a_tree_can_be_normalized_by_group(tiny):
    """Each node's advantages by that node's own deviation, as with whole episodes; not silently left undivided."""
    got = trained_with(
        tiny, [played([r], path=(i,)) for i, r in enumerate(RETURNS.tolist())], name="magrpo", tree=True, normalize="group"
    )
    assert got == near([[a / 1.1725**0.5] for a in (-0.35, 1.55, -1.45, 0.25)])


def test_advantages_are_normalized_per_agent_over_the_iteration(tiny):
    # Two groups in one iteration would be one call each; here four returns of one group, not recentred: / sqrt(1.1725).
    got = trained_with(tiny, [played([r]) for r in RETURNS.tolist()], name="mareinforce", normalize="agent")
    assert got == near([[r / 1.1725**0.5] for r in RETURNS.tolist()])  # the mean of 0.45 stays in


def test_a_group_method_learns_nothing_from_a_solved_task(tiny):
    """All returns are the same: no advantage, with and without normalization."""
    for normalize in ("none", "agent", "group"):
        got = trained_with(tiny, [played([0.7]) for _ in range(8)], name="magrpo", group_size=8, normalize=normalize)
        assert max(abs(row[0]) for row in got) < 1e-3, normalize


def test_truncated_episodes_are_judged_by_what_the_critic_expects_next(tiny):
    """The learner's TD error of the last turn is r - V if terminated, r + gamma V(final) - V if cut off."""
    done, cut = played([1.0, 1.0]), played([1.0, 1.0], truncated=True)
    for episode in (done, cut):
        episode.observations = {"agent_0": "and now?", "agent_1": "and now?"}
    config = parse_config(
        {
            "env": {"name": "agree", "wording": "terse"},
            "algorithm": {"name": "collm-cc", "gamma": 0.5, "lam": 0.0},
            "critic": {"body": "auto", "lr": 1e-9, "lam": 0.0},
        }
    )
    learner = make_learner(
        Team({a: Policy(copy.deepcopy(tiny.model), tiny.tokenizer) for a in ("agent_0", "agent_1")}), config, Sampling()
    )
    critic = critic_parts(learner)[0].critic
    torch.nn.init.normal_(critic.value.weight, std=0.02)
    said = learner.update([Group(0, [done]), Group(0, [cut])], 0).annotations
    with torch.no_grad():
        reading = critic.read(cut, 2, ("agent_0", "agent_1"))
        final = critic.value(critic.hidden(torch.from_numpy(reading.ids[None].astype(np.int64))))[0, -1].item()
    ended, cut_off = said[0][1, "agent_0"], said[1][1, "agent_0"]
    assert ended.value == pytest.approx(cut_off.value, abs=1e-5)
    assert ended.td_error == pytest.approx(1.0 - ended.value, abs=1e-5)
    assert cut_off.td_error == pytest.approx(1.0 + 0.5 * final - ended.value, abs=1e-4)
    assert abs(0.5 * final) > 1e-3  # the two differ
    for annotation in (*said[0].values(), *said[1].values()):
        assert annotation.advantage == annotation.td_error  # lam = 0, no normalization


# --- difference baselines ------------------------------------------------------------------------------------------------


def expected_gradient(baseline):
    """Of agent 0's logits, exactly: two agents with three answers each, a reward that mixes both, all nine joint answers
    weighed by their probability. baseline(own, other) -> what is subtracted. Also the advantage's variance."""
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    mine, theirs = torch.log_softmax(logits, 0), torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    reward = torch.tensor([[1.0, 4.0, -2.0], [0.5, 3.0, -1.0], [2.0, 6.0, -3.0]], dtype=torch.float64)
    total, moments = torch.zeros((), dtype=torch.float64), [0.0, 0.0]
    for own, other in itertools.product(range(3), repeat=2):
        live = torch.ones(1, dtype=torch.float64)
        advantage = A.difference(reward[own, other].view(1), row(baseline(own, other)), live)[0]
        weight = mine[own].exp().detach() * theirs[other]
        total = total + weight * advantage * mine[own]
        moments = [moments[0] + (weight * advantage).item(), moments[1] + (weight * advantage**2).item()]
    (gradient,) = torch.autograd.grad(total, logits)
    return gradient, moments[1] - moments[0] ** 2


def test_a_baseline_that_reads_the_others_answers_leaves_the_expected_gradient_as_it_is():
    plain, spread = expected_gradient(lambda own, other: 0.0)
    others = (1.2, 4.6, -2.1)
    reading, less = expected_gradient(lambda own, other: others[other])
    assert close(plain, reading)
    assert less < 0.2 * spread
    knowing, _ = expected_gradient(lambda own, other: float(own))  # the wrong variant: it knows the answer it is taken from
    assert not close(plain, knowing, 0.1)


def test_the_difference_by_hand():
    live = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]])
    found = A.difference(torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]), torch.tensor([[[1.0, 2.0], [2.5, 7.0]]]), live)
    assert found.tolist() == [[[2.0, -1.0], [0.5, 0.0]]]


@pytest.mark.parametrize("baseline", ["group_mean", "none"])
def test_the_difference_baseline_of_a_group_method_by_hand(tiny, baseline):
    """Four siblings return 4, 2, 1, 1; replayed without agent_0 the turn pays 3, 1, 1, -1: its team-mate's effect, d = 2, 0, 0,
    -2 around the mean, stands in both features (reward so far and last raw reward).

    Nothing is subtracted in the first iteration. It leaves Var(d) = 2 and Cov(d, A) = 6/4 over 4 samples, whose slopes are
    shrunk by 20 / 4 = 5 beside the correlations 1 + 1 of the two features: beta . Delta = 2 Cov / (Var (2 + 5)) d = 3/14 d.
    """
    episodes = [played([reward]) for reward in (4, 2, 1, 1)]
    for episode, alone in zip(episodes, (3, 1, 1, -1)):
        episode.turns[0].no_op["agent_0"] = Counterfactual(alone, alone, {})
    algorithm = {"name": "magrpo", "baseline": baseline, "teammates": "replay"}
    config = parse_config({"env": {"name": "agree", "wording": "terse"}, "algorithm": algorithm})
    policies = [Policy(copy.deepcopy(tiny.model), tiny.tokenizer) for _ in range(2)]
    learner = make_learner(Team(dict(zip(("agent_0", "agent_1"), policies))), config, Sampling())
    first, second = (learner.update([Group(0, episodes)], iteration) for iteration in range(2))
    plain = [2, 0, -1, -1] if baseline == "group_mean" else [4, 2, 1, 1]

    def trained(update, agent):
        return [update.annotations[e][0, agent].advantage for e in range(4)]

    assert trained(first, "agent_0") == trained(first, "agent_1") == pytest.approx(plain)
    assert trained(second, "agent_1") == pytest.approx(plain), "its no-op counterfactual is unknown"
    assert trained(second, "agent_0") == pytest.approx([a - 3 / 14 * d for a, d in zip(plain, (2, 0, 0, -2))])
    assert first.metrics["critic/replayed"] == 0.5
