"""Gradient noise scales against known noise."""

import numpy as np
import pytest

from merit_fast.split.moments import block_products
from merit_fast.split.noise import noise_scales

WIDTH = 200
BLOCKS = 8


def drawn(means, noise, examples, seed):
    """Products and square norms of Gaussian gradients with tr(Sigma) = ``noise`` [N]."""
    generator = np.random.default_rng(seed)
    sums = np.zeros((len(means), BLOCKS, WIDTH))
    squares = np.zeros((len(means), BLOCKS))
    for i, mean in enumerate(means):
        draws = generator.standard_normal((examples, WIDTH)) * np.sqrt(noise[i] / WIDTH)
        rows = (mean + draws).reshape(BLOCKS, -1, WIDTH)
        sums[i] = rows.sum(1)
        squares[i] = (rows**2).sum((1, 2))
    return block_products(sums, np.full((len(means), BLOCKS), examples // BLOCKS)), squares


def means_and_noise():
    generator = np.random.default_rng(0)
    means = generator.standard_normal((3, WIDTH)) / np.sqrt(WIDTH) * [[1.0], [2.0], [1.5]]
    return means, np.array([10.0, 80.0, 30.0])


def test_noise_scales_are_noise_over_signal_within_their_errors():
    means, noise = means_and_noise()
    weights = np.array([0.5, 0.3, 0.2])
    truth = noise / (means**2).sum(1)
    mixed = weights @ means
    second = weights @ (noise + (means**2).sum(1))
    of_mixture = (second - mixed @ mixed) / (mixed @ mixed)
    found = []
    errors = []
    for seed in range(40):
        products, squares = drawn(means, noise, 400, seed)
        scales = noise_scales(products, squares, weights, np.ones(3, bool))
        found.append((*(scales.datasets - truth), scales.mixture - of_mixture))
        errors.append((*scales.errors, scales.mixture_error))
    ratio = np.sqrt(np.mean(np.square(errors), 0)) / np.std(found, 0, ddof=1)
    assert (ratio > 0.6).all() and (ratio < 1.7).all()
    bias = np.abs(np.mean(found, 0)) / [*truth, of_mixture]
    assert (bias < 0.05).all()


def test_what_is_not_known_is_nan():
    means, noise = means_and_noise()
    products, squares = drawn(means, noise, 400, 0)
    weights = np.full(3, 1 / 3)
    some = noise_scales(products, squares, weights, np.array([True, False, True]))
    assert (
        np.isnan(some.datasets).tolist() == [False, True, False] == np.isnan(some.errors).tolist()
    )
    sums_only = noise_scales(products, np.full_like(squares, np.nan), weights, np.ones(3, bool))
    assert np.isnan(sums_only.datasets).all() and np.isnan(sums_only.mixture)
    products, squares = drawn(np.zeros((3, WIDTH)), noise, 64, 1)
    nothing = noise_scales(products, squares, weights, np.zeros(3, bool))
    assert np.isnan(nothing.mixture) and np.isnan(nothing.mixture_error)


def test_gradients_without_noise_have_scale_zero():
    means, _ = means_and_noise()
    products, squares = drawn(means, np.zeros(3), 80, 0)
    scales = noise_scales(products, squares, np.full(3, 1 / 3), np.ones(3, bool))
    assert scales.datasets == pytest.approx(0, abs=1e-6)
    assert scales.mixture > 0  # which dataset a row comes from is noise of the mixture


def tokens_drawn(means, noise, lengths, examples, seed):
    """Products, square norms and square weights of rows that count their tokens.

    Dataset i has the lengths ``lengths[i]``, each as often as the others.
    """
    generator = np.random.default_rng(seed)
    shape = (len(means), BLOCKS)
    sums = np.zeros((*shape, WIDTH))
    weights = np.zeros(shape)
    squares = np.zeros(shape)
    square_weights = np.zeros(shape)
    for i, mean in enumerate(means):
        rows = mean + generator.standard_normal((examples, WIDTH)) * np.sqrt(noise[i] / WIDTH)
        tokens = generator.choice(lengths[i], examples).astype(float)
        weighted = (rows * tokens[:, None]).reshape(BLOCKS, -1, WIDTH)
        sums[i] = weighted.sum(1)
        weights[i] = tokens.reshape(BLOCKS, -1).sum(1)
        squares[i] = (weighted**2).sum((1, 2))
        square_weights[i] = (tokens**2).reshape(BLOCKS, -1).sum(1)
    counts = np.full(shape, examples // BLOCKS)
    return block_products(sums, counts, weights), squares, square_weights


def test_by_tokens_the_scale_is_that_of_a_step_over_tokens():
    """Truth by drawing steps: mean of |step's mean over tokens - G|^2, times its rows."""
    means, noise = means_and_noise()
    lengths = [np.array([1, 2, 9]), np.array([4]), np.array([2, 30])]
    shares = np.array([0.5, 0.3, 0.2])
    generator = np.random.default_rng(5)
    rows = 400
    mean_lengths = np.array([each.mean() for each in lengths])
    chances = shares / mean_lengths / (shares / mean_lengths).sum()
    goal = shares @ means
    errors = []
    for _ in range(300):
        source = generator.choice(3, rows, p=chances)
        tokens = np.array([generator.choice(lengths[i]) for i in source], float)
        drawn_rows = generator.standard_normal((rows, WIDTH))
        step = means[source] + drawn_rows * np.sqrt(noise[source] / WIDTH)[:, None]
        errors.append(((tokens @ step / tokens.sum() - goal) ** 2).sum())
    of_mixture = rows * np.mean(errors) / (goal @ goal)
    spread = np.array([(each.astype(float) ** 2).mean() / each.mean() ** 2 for each in lengths])
    of_datasets = spread * noise / (means**2).sum(1)
    found = []
    for seed in range(30):
        products, squares, weights = tokens_drawn(means, noise, lengths, 800, seed)
        scales = noise_scales(products, squares, shares, np.ones(3, bool), weights)
        found.append((*scales.datasets, scales.mixture))
    assert np.mean(found, 0) == pytest.approx([*of_datasets, of_mixture], rel=0.07)
