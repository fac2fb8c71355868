"""Separation of a split: eta squared free of noise and of the choice made on it. Pure NumPy."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.split.conflict import (
    Debias,
    Labels,
    Similarity,
    between_sum,
    double_center,
    half_grams,
    mean_gram,
    similarity_matrix,
    total_sum,
)
from merit_fast.split.moments import BlockProducts

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Separation:
    """Between-group shares of the weighted sum of squares.

    They are estimates, so below 0 or above 1 now and then.

    Attributes:
        eta_squared: share of the split itself, debiased. The split was chosen to make it large, so
            it is high on pure noise too.
        cross_validated: mean of two shares: splits chosen on the blocks of even number, measured on
            those of odd number, and the reverse. NaN: too few blocks with examples, or no spread
            beyond noise.
        null: [R] cross-validated shares of random splits, a fresh one for each half.
    """

    eta_squared: float
    cross_validated: float
    null: Array

    @property
    def null_mean(self) -> float:
        return float(self.null.mean())

    @property
    def null_std(self) -> float:
        return float(self.null.std(ddof=1))

    @property
    def better_than_random(self) -> bool:
        """Whether the cross-validated share beats the null's mean by two standard deviations."""
        return self.cross_validated > self.null_mean + 2 * self.null_std


def measure_separation(
    products: BlockProducts,
    weights: Array,
    labels: Labels,
    partition: Callable[[Array], Labels],
    random_labels: Callable[[], Labels],
    *,
    similarity: Similarity = "cosine",
    debias: Debias = "blocks",
    draws: int = 200,
) -> Separation:
    """Judges a split by splits of half the examples and by random ones.

    Sums of squares are always debiased (U on the diagonal). The vectors are divided by the lengths
    that all blocks give (similarity "cosine") or left as they are ("gram"); the sums are divided by
    the total that all blocks give.

    Args:
        products: products of the datasets' block sums.
        weights: [N] token shares, sum 1.
        labels: [N] the split made on ``conflict_of(products, ...).similarity``.
        partition: makes a split [N] from such a matrix [N, N], here of half the examples.
        random_labels: a random balanced split [N], another one at each call.
        similarity: as in ``conflict_of``.
        debias: of the matrices that ``partition`` gets.
        draws: R, random splits for each half.
    """
    whole = mean_gram(products, "blocks")
    square = whole.square if similarity == "cosine" else np.ones(len(weights))
    centered = double_center(whole.cosine(square), weights)
    total = total_sum(centered, weights)
    if not total > 0:
        return Separation(float("nan"), float("nan"), np.full(draws, np.nan))
    eta = between_sum(centered, weights, labels) / total
    halves = half_grams(products, "blocks")
    if not all(np.isfinite(half.gram).all() for half in halves):
        return Separation(eta, float("nan"), np.full(draws, np.nan))
    judges = [double_center(half.cosine(square), weights) for half in halves]
    lengths = mean_gram(products, debias).square if similarity == "cosine" else square
    matrices = [
        similarity_matrix(half, similarity, debias, lengths)
        for half in half_grams(products, debias)
    ]

    def crossed(from_even: Labels, from_odd: Labels) -> float:
        on_odd = between_sum(judges[1], weights, from_even)
        on_even = between_sum(judges[0], weights, from_odd)
        return (on_odd + on_even) / (2 * total)

    return Separation(
        eta_squared=eta,
        cross_validated=crossed(partition(matrices[0]), partition(matrices[1])),
        null=np.array([crossed(random_labels(), random_labels()) for _ in range(draws)]),
    )


def pair_means(cosine: Array, labels: Labels) -> tuple[float, float]:
    """Mean cosine within groups and across groups.

    Counts the pairs whose cosine is known; NaN where there is none. Datasets whose rows are spread
    over the groups (-1) are in no pair.
    """
    labels = np.asarray(labels)
    upper = np.triu_indices(len(labels), 1)
    pairs = cosine[upper]
    apart = (labels[:, None] != labels)[upper]
    known = ~np.isnan(pairs) & ((labels[:, None] >= 0) & (labels >= 0))[upper]
    return _mean(pairs[known & ~apart]), _mean(pairs[known & apart])


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
