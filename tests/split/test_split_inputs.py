"""Figures that enter a split: independent of scale, unbiased, true to twins and opposites."""

import numpy as np
import pytest
from support.partitions import split_blocks

from merit_fast.split.conflict import conflict_of
from merit_fast.split.moments import block_products


def noisy_blocks(means, generator, blocks=8, per_block=16, noise=2.0):
    draws = generator.standard_normal((len(means), blocks, means.shape[1]))
    draws /= np.sqrt(means.shape[1])
    sums = per_block * means[:, None] + np.sqrt(per_block * noise) * draws
    return sums, np.full((len(means), blocks), per_block)


@pytest.mark.parametrize("debias", ["blocks", "none"])
def test_cosines_do_not_see_the_scale_of_a_dataset(debias):
    generator = np.random.default_rng(4)
    sums, counts = noisy_blocks(generator.standard_normal((10, 300)), generator)
    powers = np.ldexp(1.0, generator.integers(-30, 30, 10))[:, None, None]
    scales = generator.uniform(1e-3, 1e3, 10)[:, None, None]
    plain, doubled, scaled = (
        conflict_of(block_products(factor * sums, counts), debias=debias)
        for factor in (1.0, powers, scales)
    )
    assert np.array_equal(doubled.cosine, plain.cosine) and np.array_equal(
        doubled.error, plain.error
    )
    assert np.abs(scaled.cosine - plain.cosine).max() < 1e-6
    assert scaled.signal_fraction == pytest.approx(plain.signal_fraction, rel=1e-6)


@pytest.mark.parametrize("method", ["pca-swap", "pca-median"])
def test_twins_land_together_and_opposites_apart(method):
    generator = np.random.default_rng(5)
    axis = generator.standard_normal(300)
    first = axis + 0.3 * generator.standard_normal((4, 300))
    sums, counts = noisy_blocks(np.concatenate([first, first, -first, -first]), generator)
    groups = split_blocks(sums, counts, [f"d{i:02}" for i in range(16)], method)
    assert set(groups[:8]) != set(groups[8:]) and len(set(groups[:8])) == len(set(groups[8:])) == 1


def test_debiased_squares_are_unbiased_and_naive_ones_high_by_the_noise_of_a_mean():
    generator = np.random.default_rng(6)
    means = 0.3 * generator.standard_normal((3, 50))
    examples = 40
    covariance = 1.7
    squares = {"blocks": [], "none": []}
    for _ in range(600):
        draws = means + np.sqrt(covariance) * generator.standard_normal((examples, 3, 50))
        sums = np.stack([draws[block::8].sum(0) for block in range(8)], axis=1)
        products = block_products(sums, np.full((3, 8), examples // 8))
        for debias, of_debias in squares.items():
            of_debias.append(conflict_of(products, debias=debias).gram)
    truth = means @ means.T
    off = ~np.eye(3, dtype=bool)
    naive = np.mean(squares["none"], axis=0)
    debiased = np.mean(squares["blocks"], axis=0)
    assert np.diag(debiased) == pytest.approx(np.diag(truth), rel=0.03)
    assert np.diag(naive) - np.diag(truth) == pytest.approx(
        np.full(3, 50 * covariance / examples), rel=0.05
    )
    assert np.array_equal(naive[off], debiased[off])
    assert np.abs((debiased - truth)[off]).max() < 0.05 * np.diag(truth).max()
