"""Separation: eta squared is honest about noise, and about the choice made on it."""

import numpy as np
import pytest
from support.split.block_sums import eta_squared, sample, unit

from merit_fast.split.conflict import conflict_of
from merit_fast.split.moments import block_products
from merit_fast.split.search.medians import median_partition, weighted_axes
from merit_fast.split.search.objective import double_center
from merit_fast.split.search.space import other_splits
from merit_fast.split.separation import measure_separation, pair_means


def judge(sums, counts, seed=0, **options):
    """Separation of a PCA median split in four, with the split and the weights."""
    names = [f"d{i:02}" for i in range(len(sums))]
    weights = np.full(len(sums), 1 / len(sums))
    generator = np.random.default_rng(seed)
    products = block_products(sums, counts)

    def split(matrix):
        shares = double_center(matrix, weights) * np.outer(weights, weights)
        return median_partition(weighted_axes(shares, weights, 2).scores, weights, names).labels

    groups = split(conflict_of(products, debias="blocks").similarity)
    others = other_splits(
        groups, weights, names, 4, 60, tolerance=np.inf, seed=int(generator.integers(1 << 30))
    ).labels
    return measure_separation(products, weights, groups, split, others, **options), groups, weights


def test_eta_squared_of_a_found_split_is_honest():
    generator = np.random.default_rng(11)
    figures = []
    for _ in range(25):
        axes = generator.standard_normal((20, 2)) @ generator.standard_normal((2, 400))
        means = unit(axes + generator.standard_normal((20, 400)))
        result, groups, weights = judge(*sample(means, 64, 80, generator))
        truth = eta_squared(double_center(means @ means.T, weights), weights, groups)
        figures.append((truth, result.eta_squared, result.cross_validated, result.null_mean))
        assert result.better_than_random
    truth, eta, crossed, null = np.mean(figures, axis=0)
    assert eta == pytest.approx(truth, abs=0.04) and crossed == pytest.approx(truth, abs=0.04)
    assert eta > crossed
    assert null == pytest.approx(3 / 19, abs=0.02)  # K - 1 of N - 1 directions


@pytest.mark.parametrize("similarity", ["cosine", "gram"])
def test_a_split_of_noise_is_not_called_better_than_random(similarity):
    """All datasets have one and the same mean gradient: whatever differs is noise."""
    generator = np.random.default_rng(12)
    means = np.tile(unit(generator.standard_normal((1, 400))), (20, 1))
    called = [judge(*sample(means, 64, 80, generator), similarity=similarity)[0] for _ in range(30)]
    assert sum(result.better_than_random for result in called) <= 3


def test_eta_squared_stays_unknown_where_halves_cannot_tell():
    means = np.random.default_rng(13).standard_normal((8, 200))
    result, *_ = judge(*sample(means, 60, 1.0, np.random.default_rng(13), blocks=3))
    assert (
        np.isfinite(result.eta_squared)
        and np.isnan(result.cross_validated)
        and not result.better_than_random
    )
    same = np.tile(np.arange(1.0, 201), (8, 8, 1))
    assert not judge(same, np.ones((8, 8)))[0].better_than_random


def test_pairs_are_summed_up_within_and_across_groups():
    cosine = np.array(
        [[1, 0.5, -0.3, np.nan], [0.5, 1, -0.1, np.nan], [-0.3, -0.1, 1, np.nan], [np.nan] * 4]
    )
    assert pair_means(cosine, [0, 0, 1, 1]) == pytest.approx((0.5, -0.2))
    assert pair_means(cosine, [0, 1, 0, 1]) == pytest.approx((-0.3, 0.2))
    assert np.isnan(pair_means(cosine, [0, 1, 2, 2])[0])


def test_datasets_spread_over_the_groups_are_in_no_pair():
    cosine = np.array([[1, 0.5, -0.9], [0.5, 1, -0.9], [-0.9, -0.9, 1]])
    assert pair_means(cosine, [0, 0, -1])[0] == 0.5
    assert np.isnan(pair_means(cosine, [-1, -1, -1])).all()
