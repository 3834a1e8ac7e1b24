"""Means and intervals by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from collm.studies.intervals import by_task, holm, interval, student, student_p


def test_the_interval_of_eight_coin_flips_is_the_binomial_one():
    """Means of resamples are Binomial(8, 1/2) / 8: P(X <= 0) = 1/256 < 2.5 % < P(X <= 1) = 9/256."""
    found = interval([0, 0, 0, 0, 1, 1, 1, 1])
    assert (found.mean, found.low, found.high, found.num_tasks, found.note) == (0.5, 1 / 8, 7 / 8, 8, "")


def test_the_interval_of_many_tasks_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = interval(list(values))
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_same_seed_same_interval_and_columns_are_resampled_together():
    values = np.random.default_rng(2).normal(size=30)
    assert interval(values) == interval(values)
    assert interval(values, seed=1) != interval(values)
    one, other = interval(values), interval(values * 3 + 1)
    assert (other.mean, other.low, other.high) == pytest.approx([3 * x + 1 for x in (one.mean, one.low, one.high)])


def test_seven_tasks_get_no_interval_and_a_reason():
    found = interval([0.0, 1.0] * 3 + [0.5])
    assert (found.mean, found.low, found.high) == (0.5, None, None)
    assert "7 distinct tasks" in found.note
    assert "at least 8" in found.note
    assert "1 distinct task," in interval([1.0]).note
    assert interval([0.0, 1.0] * 4).low is not None
    with pytest.raises(ValueError, match="no task"):
        interval([])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_a_number_is_neither_left_out_nor_replaced(bad):
    found = interval([0.0] * 8 + [bad, bad])
    assert math.isnan(found.mean)
    assert found.low is None
    assert found.note == "not a finite number for 2 of 10 tasks"
    assert found.plain() == {"mean": None, "low": None, "high": None}


def test_a_task_counts_once_however_often_it_was_played():
    """Eight tasks, the first played 93 times: the mean is over tasks, and the interval as wide as eight tasks make it."""
    tasks = ["t0"] * 93 + [f"t{i}" for i in range(1, 8)]
    values = [0.0] * 93 + [0, 0, 0, 1, 1, 1, 1]
    assert list(by_task(tasks, values)) == [f"t{i}" for i in range(8)]
    assert interval(list(by_task(tasks, values).values())) == interval([0, 0, 0, 0, 1, 1, 1, 1])
    assert interval(values).high < 0.1  # what counting episodes would have said
    assert by_task(["a", "b", "a"], [1.0, 5.0, 2.0]) == {"a": 1.5, "b": 5.0}


def test_students_interval_and_p_value_by_hand():
    """1, 2, 3: mean 2, standard error 1 / sqrt(3), two degrees of freedom; p has the closed form 1 - t / sqrt(2 + t^2)."""
    found = student([1.0, 2.0, 3.0], fewest=3)
    assert found.high - 2 == pytest.approx(4.30265 / 3**0.5, rel=1e-5)
    t = 2 * 3**0.5
    assert student_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / (2 + t**2) ** 0.5)
    # quantiles of published tables: 2.776 (4), 2.262 (9), 2.045 (29 degrees of freedom)
    for num, quantile in ((5, 2.776), (10, 2.262), (30, 2.045)):
        values = [float(k) for k in range(num)]
        shift = quantile * float(np.std(values, ddof=1)) / num**0.5 - (num - 1) / 2
        assert student_p([value + shift for value in values]) == pytest.approx(0.05, abs=2e-4)
    assert math.isnan(student_p([1.0]))
    assert math.isnan(student_p([1.0, math.nan]))
    assert (student_p([0.0, 0.0]), student_p([2.0, 2.0])) == (1.0, 0.0)


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, then no less than that
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    corrected = holm([0.02, math.nan])
    assert corrected[0] == 0.02  # what was not tested does not count
    assert math.isnan(corrected[1])


def test_intervals_that_touch_are_not_apart():
    low, high = interval([0.0] * 8), interval([1.0] * 8)
    assert low.apart(high)
    assert high.apart(low)
    assert not low.apart(low)
    assert not low.apart(interval([5.0] * 7))  # no interval, no claim
