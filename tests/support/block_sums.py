"""Block sums of sketches for tests: drawn, or sampled from datasets of known means."""

import numpy as np

FIELDS = ("counts", "within", "total", "left_out", "halves")


def draw(datasets=6, blocks=8, width=5000, seed=0):
    """Block sums of very different lengths, with heavy-tailed columns, and unequal counts."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(
        2 * generator.standard_normal((datasets, 1, 1)) + generator.standard_normal(width)
    )
    sums = generator.standard_normal((datasets, blocks, width)) * lengths + 0.3 * lengths
    return sums, generator.integers(3, 9, (datasets, blocks))


def sample(means, examples, noise, generator, blocks=8):
    """Block sums of ``examples`` gradients, round-robin: each its dataset's mean, plus noise of that square length."""
    counts = np.array([examples // blocks + (g < examples % blocks) for g in range(blocks)])
    size = counts[:, None].astype(float)
    draws = generator.standard_normal((len(means), blocks, means.shape[1])) / np.sqrt(
        means.shape[1]
    )
    return size * means[:, None] + np.sqrt(size * noise) * draws, np.tile(counts, (len(means), 1))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def assert_same_bits(first, second, fields=FIELDS):
    for field in fields:
        assert np.array_equal(getattr(first, field), getattr(second, field), equal_nan=True), field
