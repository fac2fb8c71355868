"""Estimates from sums over blocks of examples: unbiased squares, signal fractions, their errors.

Pure NumPy. The sketch stage stops sketching a dataset by them; the split stage takes its
standard errors from them.
"""

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def signal_fractions(within: Array, counts: Array) -> tuple[Array, Array]:
    """Computes U / R of each dataset and its jackknife standard error.

    Args:
        within: [N, G, G] inner products of a dataset's block sums.
        counts: [N, G] sums of the weights of the examples in them.

    Returns:
        [N] and [N]. NaN where fewer than two (the error: three) blocks have examples; 0 where all
        gradients are 0.
    """
    square = np.einsum("ngg->ng", within)
    row = within.sum(2)
    total = within.sum((1, 2))
    fraction = _ratio(total, square.sum(1), counts.sum(1), (counts**2).sum(1))
    left_out = _ratio(
        total[:, None] - 2 * row + square,
        square.sum(1)[:, None] - square,
        counts.sum(1)[:, None] - counts,
        (counts**2).sum(1)[:, None] - counts**2,
    )
    return fraction, jackknife_error(left_out.T)


def unbiased_square(total: Array, within: Array, number: Array, squares: Array) -> Array:
    """Unbiased square of a mean of ``number`` examples.

    Args:
        total: square of the sum over all blocks.
        within: sum of the blocks' squares.
        number: number of examples.
        squares: sum of the squares of the blocks' counts.
    """
    pairs = number**2 - squares  # pairs of examples in different blocks
    return np.asarray((total - within) / np.where(pairs > 0, pairs, np.nan))


def _ratio(total: Array, within: Array, number: Array, squares: Array) -> Array:
    naive = total / number**2
    unbiased = unbiased_square(total, within, number, squares)
    return np.asarray(unbiased / np.where(naive > 0, naive, 1.0))


def jackknife_error(left_out: Array) -> Array:
    """Standard error of a figure [...] from its values [G, ...] with one block left out."""
    folds = len(left_out)
    deviation = left_out - left_out.mean(0)
    return np.asarray(np.sqrt((folds - 1) / folds * (deviation**2).sum(0)))
