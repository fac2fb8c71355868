"""Numbers from sketch states: cosines of mean gradients, their errors, signal fractions. Pure NumPy, no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Conflict:
    """N datasets.

    Attributes:
        cosine: [N, N] cosines of the mean gradients' sketches, diagonal 1.
        error: [N, N] block-jackknife standard errors of ``cosine``, diagonal 0.
        norm: [N] length of each mean gradient.
        signal_fraction: [N] unbiased over naive estimate of its square: 1 is noiseless, 0 all noise.
    """

    cosine: Array
    error: Array
    norm: Array
    signal_fraction: Array

    @property
    def negative_pair_fraction(self) -> float:
        """Share of dataset pairs with a negative cosine."""
        pairs = self.cosine[np.triu_indices(len(self.cosine), 1)]
        return float((pairs < 0).mean()) if len(pairs) else 0.0


def measure_conflict(block_sums: Array, block_counts: npt.NDArray[Any]) -> Conflict:
    """Cosines and their errors from per-block sums alone.

    Args:
        block_sums: [N, G, D] summed sketches of each dataset's blocks.
        block_counts: [N, G] examples in them; every dataset needs two blocks or more.
    """
    counts = block_counts.astype(np.float64)
    total, number = block_sums.sum(1), counts.sum(1)  # [N, D], [N]
    raw = np.einsum("nd,nd->n", total, total)
    # Pairs of different blocks only: the sampling noise of the mean is in the pairs of one block with itself.
    own = np.einsum("ngd,ngd->n", block_sums, block_sums)
    unbiased = (raw - own) / np.maximum(number**2 - (counts**2).sum(1), 1.0)
    return Conflict(
        cosine=cosine_matrix(total),
        error=_jackknife_error(block_sums, total),
        norm=np.sqrt(raw) / number,
        signal_fraction=np.clip(unbiased / np.maximum(raw / number**2, 1e-300), 0.0, 1.0),
    )


def cosine_matrix(rows: Array) -> Array:
    """[N, N] cosines of the rows [N, D]; a zero row has cosine 0 with all others."""
    gram = rows @ rows.T
    length = np.sqrt(np.diag(gram))
    scale = np.where(length > 0, length, 1.0)
    cosine = np.clip(gram / np.outer(scale, scale), -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(cosine)


def double_center(matrix: Array, weights: Array) -> Array:
    """J M J^T with J = I - 1 w^T: the Gram of what remains when the weighted mean is taken off. w sums to 1."""
    centering = np.eye(len(weights)) - np.outer(np.ones(len(weights)), weights)
    return np.asarray(centering @ matrix @ centering.T)


def eta_squared(centered: Array, weights: Array, groups: Sequence[int]) -> float:
    """Between-group share of the weighted sum of squares, in [0, 1]; 0 if nothing varies."""
    labels = np.asarray(groups)
    between = 0.0
    for group in np.unique(labels):
        inside = weights * (labels == group)
        between += float(inside @ centered @ inside / inside.sum())
    total = float(weights @ np.diag(centered))
    return between / total if total > 0 else 0.0


def _jackknife_error(block_sums: Array, total: Array) -> Array:
    """Standard error from leaving out block g of every dataset, g = 0..G-1 (Quenouille 1949; Tukey 1958)."""
    blocks = block_sums.shape[1]
    left_out = np.stack([cosine_matrix(total - block_sums[:, g]) for g in range(blocks)])
    deviation = left_out - left_out.mean(0)
    error = np.sqrt((blocks - 1) / blocks * (deviation**2).sum(0))
    np.fill_diagonal(error, 0.0)
    return np.asarray(error)
