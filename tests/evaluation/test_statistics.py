"""Means, spreads, slopes and their confidence."""

import numpy as np
import pytest

from rf_train.evaluation.statistics import interval, mean_and_std, slope, slope_with_interval


def test_mean_and_spread_of_what_was_measured():
    assert mean_and_std([1.0, None, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_std([5.0]) == (5.0, 0.0) and mean_and_std([None]) == (None, None)


def test_the_slope_of_a_line_and_of_too_little():
    assert slope([1.0, 3.0, None, 7.0], range(4)) == pytest.approx(2.0)
    assert slope([1.0, None], range(2)) is None


def test_the_interval_covers_the_mean_as_often_as_it_says():
    random = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        values = random.normal(size=40)
        low, high = interval(40, lambda chosen, values=values: float(values[chosen].mean()))
        inside.append(low < 0 < high)
    assert 0.83 < np.mean(inside) <= 1
    assert interval(1, lambda chosen: 0.0) is None  # one clip has no spread


def test_a_slope_that_all_clips_share_is_certain():
    rows = [[0.0, -1.0, -2.0], [5.0, 4.0, 3.0], [None, 1.0, 0.0]]
    assert slope_with_interval(rows, range(3)) == {"slope": -1.0, "low": -1.0, "high": -1.0}
    assert slope_with_interval([[None, None]], range(2)) == {"slope": None, "low": None, "high": None}
