"""Student's t, and values that are below zero though many were tested."""

import numpy as np
import pytest

from merit_fast.split.student import one_sided_t, surely_negative, upper_tail

# 5 %, 1 % and 0.1 % points of Student's t from tables
POINTS = {
    1: (6.314, 31.82, 318.3),
    2: (2.920, 6.965, 22.33),
    3: (2.353, 4.541, 10.21),
    7: (1.895, 2.998, 4.785),
    8: (1.860, 2.896, 4.501),
    30: (1.697, 2.457, 3.385),
}


@pytest.mark.parametrize("freedom", POINTS)
def test_tails_are_those_of_the_tables(freedom):
    points = np.array(POINTS[freedom])
    assert upper_tail(points, freedom) == pytest.approx([0.05, 0.01, 0.001], rel=2e-3)
    assert upper_tail(-points, freedom) == pytest.approx([0.95, 0.99, 0.999], rel=2e-3)
    assert upper_tail(np.array([0.0, np.inf, -np.inf]), freedom) == pytest.approx([0.5, 0, 1])
    if freedom >= 3:
        assert one_sided_t(freedom) == pytest.approx(points[0], rel=0.01)


def test_strong_values_are_found_and_chance_yields_none():
    generator = np.random.default_rng(0)
    errors = np.full(300, 0.1)
    called = 0
    for _ in range(50):
        chance = generator.standard_t(7, 300) * 0.1
        called += surely_negative(chance, errors, 7).any()
    assert called <= 3  # of 50 families of 300 values that are zero
    values = np.concatenate((np.full(30, -1.0), generator.standard_t(7, 270) * 0.1))
    found = surely_negative(values, errors, 7)
    assert found[:30].all() and found[30:].sum() <= 2


def test_values_without_error_are_judged_by_their_sign():
    found = surely_negative(np.array([-0.1, 0.0, 0.1]), np.zeros(3), 7)
    assert found.tolist() == [True, False, False]
    assert not len(surely_negative(np.empty(0), np.empty(0), 7))
