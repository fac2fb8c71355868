"""The number of groups: as many as data and steps support, with a sentence of explanation."""

import numpy as np
import pytest

from merit_fast.split.auto import candidate_numbers, choose_num_groups
from merit_fast.split.conflict import conflict_of, double_center
from merit_fast.split.moments import block_products
from merit_fast.split.search.partition import partition_datasets
from merit_fast.split.search.space import other_splits
from merit_fast.split.separation import Separation, measure_separation

SPREAD = np.linspace(-1.0, 1.0, 20) / np.linspace(-1.0, 1.0, 20).std(ddof=1)


def found(value, mean=0.05, deviation=0.02):
    return Separation(value, value, mean + deviation * SPREAD)


def choose(table, steps=2000.0, shares=None, **options):
    asked = []

    def measure(groups):
        asked.append(groups)
        return table[groups], (shares or {}).get(groups, 1 / groups)

    return choose_num_groups(table, measure, steps, **options), asked


def test_the_largest_number_that_stands_out_is_taken():
    choice, _ = choose({2: found(0.2), 4: found(0.4, 0.1), 8: found(0.41, 0.25)})
    assert choice.num_groups == 4 and set(choice.separations) == {2, 4, 8}
    assert choice.reason == (
        "4 groups: cross-validated eta squared is 0.400, of random splits 0.100 ± 0.020; "
        "the shortest branch takes 500 steps"
    )


def test_halving_two_groups_at_random_makes_no_four():
    """Four groups still beat random fours, but add to two no more than chance adds."""
    assert choose({2: found(0.4), 4: found(0.46, 0.12)})[0].num_groups == 2
    assert choose({2: found(0.06), 4: found(0.46, 0.12)})[0].num_groups == 4


@pytest.mark.parametrize(
    "table,options,reason",
    [
        ({}, {}, "there are too few datasets to tell a split from a random one"),
        (
            {2: found(0.4)},
            {"steps": 120},
            "2 branches would take 60 optimizer steps each, fewer than 100",
        ),
        ({2: found(0.4)}, {"steps": 120, "min_steps": 60}, None),
        (
            {2: found(0.4)},
            {"steps": 220, "shares": {2: 0.4}},
            "the shortest of 2 branches would take 88 optimizer steps, fewer than 100, though "
            "cross-validated eta "
            "squared is 0.400, of random splits 0.050 ± 0.020",
        ),
        (
            {2: found(0.08), 4: found(0.1, 0.11)},
            {},
            "no split stands out of random ones; for 2 groups cross-validated eta squared is "
            "0.080, of random splits "
            "0.050 ± 0.020",
        ),
        (
            {2: Separation(0.9, 0.9, np.linspace(0.0, 0.1, 9), num_splits=10)},
            {},
            "a split into 2 groups cannot be told from chance: 9 other balanced splits exist, so "
            "p >= 0.1",
        ),
        (
            {2: Separation(0.2, -0.03, SPREAD - 0.5)},
            {},
            "no split stands out of random ones; for 2 groups cross-validated eta squared is "
            "not resolved, of random splits not resolved ± 1.000",
        ),
        (
            {2: Separation(float("nan"), float("nan"), np.full(3, np.nan))},
            {},
            "the gradients differ by no more than their noise, so nothing is left to measure a "
            "split by",
        ),
    ],
)
def test_one_group_comes_with_the_reason(table, options, reason):
    choice, _ = choose(table, **options)
    if reason is None:
        assert choice.num_groups == 2
    else:
        assert choice.num_groups == 1 and choice.reason == f"splitting would not help: {reason}"


def test_nothing_is_measured_that_cannot_have_the_steps():
    choice, asked = choose({2: found(0.2), 4: found(0.4), 8: found(0.7)}, steps=450)
    assert choice.num_groups == 4 and asked == [2, 4]


def test_candidates_leave_four_datasets_to_a_group():
    assert [candidate_numbers(number) for number in (7, 8, 16, 31, 32, 176)] == [
        [],
        [2],
        [2, 4],
        [2, 4],
        [2, 4, 8],
        [2, 4, 8],
    ]


@pytest.mark.parametrize("planted,expected", [(0, 1), (1, 2), (2, 4)])
def test_planted_conflicts_are_counted(planted, expected):
    """No axis, one or two with two sides each; 24 datasets of 160 noisy examples."""
    generator = np.random.default_rng(planted)
    basis = np.linalg.qr(generator.standard_normal((300, 30)))[0].T
    sides = np.array([[(i >> axis & 1) * 2 - 1 for axis in range(2)] for i in range(24)]) * (
        np.arange(2) < planted
    )
    means = basis[:24] + 1.2 * sides @ basis[24:26]
    sums = 20 * means[:, None] + np.sqrt(20 * 40 / 300) * generator.standard_normal((24, 8, 300))
    products = block_products(sums, np.full((24, 8), 20))
    weights = np.full(24, 1 / 24)
    names = [f"d{i:02}" for i in range(24)]

    def measure(groups):
        def maker(matrix):
            return partition_datasets(double_center(matrix, weights), weights, names, groups).labels

        chosen = maker(conflict_of(products, debias="blocks").similarity)
        others = other_splits(chosen, weights, names, groups, 100).labels
        return measure_separation(products, weights, chosen, maker, others), 1 / groups

    choice = choose_num_groups(candidate_numbers(24), measure, steps=1000)
    assert choice.num_groups == expected, choice.reason
