"""The regression on a world's own numbers, against hand-derived values and numpy's least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from collm.algorithms.regression import MetricCeiling, Moments, TaskRidge, TurnRegression, left_out_errors
from collm.algorithms.stats import explained_variance, without_task_means


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Predictions of the samples themselves."""
    moments = Moments(x.shape[1])
    moments.add(x, y)
    return moments.predict(x, strength)


def test_a_line_through_three_points_by_hand():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    y = torch.tensor([1.0, 3.0, 5.0])
    assert ridge(x, y, 0.0).tolist() == pytest.approx([1.0, 3.0, 5.0])
    # Var(x) = 2/3, Cov = 4/3: slope 2 without penalty; with strength 1 the slope halves and the mean stays
    assert ridge(x, y, 1.0).tolist() == pytest.approx([2.0, 3.0, 4.0])


def test_least_squares_of_numpy_is_met_for_any_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)) * [1, 1000, 1e-3] + [0, 5, -7]
    y = x @ [2.0, 1e-3, 40.0] + rng.normal(size=50)
    design = np.c_[x, np.ones(50)]
    expected = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert ridge(torch.tensor(x), torch.tensor(y), 0.0).numpy() == pytest.approx(expected, abs=1e-5)


def test_constant_and_repeated_features_do_no_harm():
    x = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 2.0, 2.0]])  # a constant, and one feature twice
    y = torch.tensor([1.0, 3.0, 5.0])
    assert ridge(x, y, 0.0).tolist() == pytest.approx([1.0, 3.0, 5.0], abs=1e-6)
    assert ridge(x[:1], y[:1], 0.0).tolist() == [1.0]  # a single sample: its own return


def test_moments_of_parts_are_those_of_the_whole():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 2, generator=generator) + 3, torch.randn(40, generator=generator)
    whole, parts = Moments(2), Moments(2)
    whole.add(x, y)
    for start in range(0, 40, 8):
        parts.add(x[start : start + 8], y[start : start + 8])
    assert torch.allclose(whole.mean, parts.mean)
    assert torch.allclose(whole.second, parts.second)
    assert parts.weight == 40
    parts.add(x[:0], y[:0], keep=0.5)  # nothing new: nothing forgotten
    assert parts.weight == 40


def test_old_samples_fade():
    moments = Moments(1)
    moments.add(torch.zeros(8, 1), torch.zeros(8))
    moments.add(torch.zeros(8, 1), torch.ones(8), keep=0.5)
    assert moments.predict(torch.zeros(1, 1), 0.0).item() == pytest.approx(8 / 12)  # weights 4 and 8


def test_the_metric_ceiling_is_the_adjusted_share_within_tasks():
    rng = np.random.default_rng(3)
    tasks = np.repeat(np.arange(12), 4)
    x = rng.normal(size=(48, 2)) + tasks[:, None]  # differences between tasks say nothing here
    y = x @ [1.0, -0.5] + rng.normal(size=48) + 5 * rng.normal(size=12)[tasks]
    centre = lambda a: a - np.array([a[tasks == t].mean(0) for t in tasks])  # noqa: E731
    design, wanted = centre(x), centre(y)
    missed = ((wanted - design @ np.linalg.lstsq(design, wanted, rcond=None)[0]) ** 2).sum()
    expected = 1 - missed / (48 - 12 - 2) / ((wanted**2).sum() / (48 - 12))
    ceiling = MetricCeiling(3, 2)
    wide = torch.tensor(np.c_[x, np.ones(48)]), torch.tensor(y), torch.tensor(tasks)  # a number that never varies is no number
    assert ceiling.measure(0, *wide) == pytest.approx(expected, abs=1e-6)
    left = 68.4 - 2 * (36 + 0.81 * 36) / 68.4  # 68.4 = 36 + 0.9 * 36
    assert ceiling.measure(0, *wide) == pytest.approx(1 - (1 - expected) * 34 / 36 * 68.4 / left, abs=1e-6)
    assert math.isnan(ceiling.measure(1, wide[0][::4], wide[1][::4], wide[2][::4]))  # each task once
    assert ceiling.free.tolist() == pytest.approx([68.4, 0.0])
    assert ceiling.squared.tolist() == pytest.approx([65.16, 0.0])
    again = MetricCeiling(3, 2)
    again.load_state_dict(ceiling.state_dict())
    assert again.measure(5, *wide) == ceiling.measure(1, *wide)  # turns beyond the last share its moments


def test_the_metric_ceiling_is_right_on_average_although_old_samples_fade():
    """Eight numbers, four pairs an iteration: what they truly explain (0, or half) is told without bias; taking away eight
    degrees of freedom, as if all samples weighed alike, would tell 0.1 too little."""
    rng = np.random.default_rng(0)
    tasks = torch.arange(4).repeat(2)
    for true in (0.0, 0.5):
        found = []
        for _ in range(40):
            ceiling = MetricCeiling(8, 1)
            for step in range(50):
                x = rng.normal(size=(8, 8))
                y = math.sqrt(true / 8) * x.sum(1) + math.sqrt(1 - true) * rng.normal(size=8)
                share = ceiling.measure(0, torch.tensor(x), torch.tensor(y), tasks)
                if step >= 30:
                    found.append(share)
        assert np.mean(found) == pytest.approx(true, abs=0.05)


def test_nothing_is_expected_before_the_first_sample():
    assert TurnRegression(2, 3)(torch.ones(4, 5, 2)).tolist() == [[0.0] * 5] * 4


def test_each_turn_has_its_own_slope_and_late_turns_share_the_last():
    regression = TurnRegression(1, 2, strength=0.0)
    features = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None].expand(4, 3, 1)
    returns = torch.stack([1 * features[:, 0, 0], 2 * features[:, 1, 0], 2 * features[:, 2, 0]], 1)
    regression.learn(features, returns, torch.ones(4, 3, dtype=torch.bool))
    assert torch.allclose(regression(features), returns, atol=1e-5)
    assert [moments.weight.item() for moments in regression.turns] == [4, 8]  # turns 1 and 2 are counted together


def test_samples_that_are_not_chosen_do_not_count():
    regression = TurnRegression(1, 1, strength=0.0)
    chosen = torch.tensor([[True], [True], [False]])
    regression.learn(torch.zeros(3, 1, 1), torch.tensor([[1.0], [3.0], [100.0]]), chosen)
    assert regression(torch.zeros(1, 1, 1)).item() == pytest.approx(2.0)


@pytest.mark.parametrize(("strength", "samples"), [(0.0, 4.0), (4.0, 8.0)])
def test_the_penalty_grows_with_the_number_of_features_that_vary(strength, samples):
    """Two orthogonal features of variance 1, a constant one, y = the first: slope 1 / (1 + samples / 4), 4 the weight."""
    regression = TurnRegression(3, 1, strength=strength, per_feature=2.0)
    features = torch.tensor([[1.0, 1.0, 7.0], [1.0, -1.0, 7.0], [-1.0, 1.0, 7.0], [-1.0, -1.0, 7.0]])[:, None]
    regression.learn(features, features[..., 0], torch.ones(4, 1, dtype=torch.bool))
    expected = 1 / (1 + samples / 4)
    assert regression(features)[:, 0].tolist() == pytest.approx([expected, expected, -expected, -expected])


def test_task_means_are_taken_out_before_variance_is_explained():
    returns = torch.tensor([0.0, 2.0, 10.0, 12.0, 99.0])
    tasks = torch.tensor([7, 7, 3, 3, 5])
    assert without_task_means(returns, tasks).tolist() == [-1.0, 1.0, -1.0, 1.0]  # task 5 came once
    knows_the_task = torch.tensor([1.0, 1.0, 11.0, 11.0, 99.0])
    assert explained_variance(knows_the_task, returns) > 0.99
    assert explained_variance(without_task_means(knows_the_task, tasks), without_task_means(returns, tasks)) == 0.0
    assert without_task_means(torch.tensor([1.0]), torch.tensor([0])).tolist() == []
    assert math.isnan(explained_variance(torch.zeros(0), torch.zeros(0)))


@pytest.mark.parametrize("num_features", [3, 20])
def test_errors_without_a_task_are_those_of_a_regression_fitted_without_it(num_features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x_SM = torch.randn(13, num_features, generator=generator, dtype=torch.float64)
    x_SM -= x_SM.mean(0)
    y_S = torch.randn(13, generator=generator, dtype=torch.float64)
    tasks_S = torch.tensor([4, 4, 1, 1, 1, 0, 0, 7, 7, 7, 7, 2, 9])
    penalties = torch.tensor([0.1, 5.0], dtype=torch.float64)
    U, d, _ = torch.linalg.svd(x_SM, full_matrices=False)
    found_PS = left_out_errors(U, d, y_S - y_S.mean(), tasks_S, penalties)
    for p, penalty in enumerate(penalties):
        for task in tasks_S.unique():
            left, kept = tasks_S == task, tasks_S != task
            rows = torch.cat([torch.ones(len(x_SM), 1, dtype=torch.float64), x_SM], 1)  # the constant has no penalty
            ridge = penalty * torch.eye(num_features + 1, dtype=torch.float64)
            ridge[0, 0] = 0
            beta = torch.linalg.solve(rows[kept].T @ rows[kept] + ridge, rows[kept].T @ y_S[kept])
            assert torch.allclose(found_PS[p, left], y_S[left] - rows[left] @ beta, atol=1e-9)


def test_features_that_only_identify_tasks_are_shrunk() -> None:
    """Each task has a direction and a return of its own. Samples that are left out one by one are predicted by their siblings,
    which says nothing about another task."""
    generator = torch.Generator().manual_seed(1)
    tasks_S = torch.arange(10).repeat_interleave(6)
    features_SM = torch.randn(10, 40, generator=generator)[tasks_S] + 0.1 * torch.randn(60, 40, generator=generator)
    returns_S = torch.randn(10, generator=generator)[tasks_S] + 0.1 * torch.randn(60, generator=generator)
    by_task, by_sample = TaskRidge(features_SM, returns_S, tasks_S), TaskRidge(features_SM, returns_S, torch.arange(60))
    assert by_task.penalty > 100 * by_sample.penalty
    assert by_task(features_SM).std() < 0.5 * returns_S.std()
    assert by_sample(features_SM).std() > 0.9 * returns_S.std()  # the wrong variant


def test_a_ridge_finds_a_direction_that_all_tasks_share() -> None:
    generator = torch.Generator().manual_seed(2)
    tasks_S, features_SM = torch.arange(30).repeat_interleave(4), torch.randn(120, 50, generator=generator)
    features_SM[:, 7] = 3.0  # never varies
    returns_S = 5 + 2 * features_SM[:, 0] + 0.1 * torch.randn(120, generator=generator)
    fitted = TaskRidge(features_SM[:80], returns_S[:80], tasks_S[:80])
    assert (fitted(features_SM[80:]) - returns_S[80:]).square().mean() < 0.2
    assert TaskRidge(features_SM, torch.full((120,), 2.5), tasks_S)(features_SM[:3]).tolist() == pytest.approx([2.5] * 3)
    alone = TaskRidge(features_SM, returns_S, torch.zeros(120))  # one task: samples are left out one by one
    assert (alone(features_SM) - returns_S).square().mean() < 0.2


def test_a_ridge_on_one_sample_is_its_constant() -> None:
    one = TaskRidge(torch.randn(1, 4), torch.tensor([2.0]), torch.zeros(1))
    assert one(torch.randn(3, 4)).tolist() == [2.0, 2.0, 2.0]
