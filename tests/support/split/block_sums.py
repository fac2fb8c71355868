"""Block sums of sketches for tests: drawn, or sampled from known means; their figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from merit_fast.split.conflict import Conflict, Debias, Labels, conflict_of
from merit_fast.split.moments import BlockProducts, block_products
from merit_fast.split.search.objective import between_sum, total_sum

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

FIELDS = ("counts", "within", "total", "left_out", "halves")


def draw(
    datasets: int = 6, blocks: int = 8, width: int = 5000, seed: int = 0
) -> tuple[Floats, Integers]:
    """Block sums of very different lengths, with heavy-tailed columns, and unequal counts."""
    generator = np.random.default_rng(seed)
    lengths = np.exp(
        2 * generator.standard_normal((datasets, 1, 1)) + generator.standard_normal(width)
    )
    sums = generator.standard_normal((datasets, blocks, width)) * lengths + 0.3 * lengths
    return sums, generator.integers(3, 9, (datasets, blocks))


def sample(
    means: Floats, examples: int, noise: float, generator: np.random.Generator, blocks: int = 8
) -> tuple[Floats, Integers]:
    """Block sums of ``examples`` gradients per dataset, dealt to the blocks in turn.

    Each gradient is its dataset's mean plus noise of square length ``noise``.
    """
    counts = np.array([examples // blocks + (g < examples % blocks) for g in range(blocks)])
    size = counts[:, None].astype(float)
    draws = generator.standard_normal((len(means), blocks, means.shape[1]))
    draws /= np.sqrt(means.shape[1])
    return size * means[:, None] + np.sqrt(size * noise) * draws, np.tile(counts, (len(means), 1))


def unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def measure_conflict(
    block_sums: Sequence[Any], block_counts: NDArray[Any], *, debias: Debias = "none"
) -> Conflict:
    """Conflict of block sums; by default the published, naive cosines."""
    return conflict_of(block_products(block_sums, block_counts), debias=debias)


def eta_squared(centered: Floats, weights: Floats, labels: Labels) -> float:
    """Between-group share of the weighted sum of squares, in [0, 1] for a Gram of vectors."""
    return between_sum(centered, weights, labels) / total_sum(centered, weights)


def products_of(products: BlockProducts, datasets: ArrayLike) -> BlockProducts:
    """Products of some datasets, in this order."""
    chosen = np.asarray(datasets)
    square = np.ix_(chosen, chosen)
    return BlockProducts(
        products.counts[chosen],
        products.weights[chosen],
        products.within[chosen],
        products.total[square],
        np.stack([matrix[square] for matrix in products.left_out]),
        np.stack([matrix[square] for matrix in products.halves]),
    )


def assert_same_bits(first: object, second: object, fields: Sequence[str] = FIELDS) -> None:
    for field in fields:
        assert np.array_equal(getattr(first, field), getattr(second, field), equal_nan=True), field
