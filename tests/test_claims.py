"""Checks say what the numbers say."""

from __future__ import annotations

import numpy as np
import pytest

from residual.claims import hunchback, trend

ERROR = np.full(7, 0.5)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([10, 14, 18, 20, 18, 15, 12], "supported"),
        ([10, 11, 12, 13, 14, 15, 16], "not supported"),
        ([16, 15, 14, 13, 12, 11, 10], "not supported"),
        ([10, 10.5, 11, 11, 10.8, 10.5, 10], "inconclusive"),
        ([10] * 7, "not supported"),
    ],
)
def test_a_hunch_has_two_sides(values, verdict):
    assert hunchback(np.array(values, float), ERROR).verdict == verdict


@pytest.mark.parametrize(
    ("values", "direction", "verdict"),
    [
        ([1, 2, 3, 4, 5, 7, 6], "rises", "supported"),
        ([1, 2, 3, 4, 5, 7, 6], "falls", "not supported"),
        ([7, 6, 5, 4, 3, 2, 1], "falls", "supported"),
        ([3, 3, 3, 3, 3, 3, 3], "rises", "not supported"),
        ([1, 5, 2, 3, 6, 2, 5], "rises", "inconclusive"),
    ],
)
def test_a_trend_has_a_direction(values, direction, verdict):
    assert trend(np.array(values, float), direction).verdict == verdict


def test_claims_refuse_what_they_cannot_judge():
    for values in ([1.0, 2.0], [1.0, np.nan, 2.0]):
        with pytest.raises(ValueError, match="at least 3 layers"):
            trend(np.array(values), "rises")
    with pytest.raises(ValueError, match="positive"):
        hunchback(np.arange(7.0), np.zeros(7))
