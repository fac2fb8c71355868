"""Separation of a split: eta squared free of noise and of the choice made on it. Pure NumPy."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import jackknife_error
from merit_fast.split.conflict import (
    Debias,
    Labels,
    MeanGram,
    Similarity,
    half_grams,
    left_out_grams,
    mean_gram,
    similarity_matrix,
)
from merit_fast.split.moments import BlockProducts
from merit_fast.split.search.objective import between_sum, between_sums, double_center, total_sum
from merit_fast.split.student import one_sided_t

Array = npt.NDArray[np.float64]


FEWEST_SPLITS = 20  # distinct other splits that a standard deviation needs


@dataclass(frozen=True)
class Separation:
    """Between-group shares of the weighted sum of squares.

    They are estimates, so below 0 or above 1 now and then. All are NaN where the whole sum does not
    stand out of its noise: nothing is there to be shared out.

    Attributes:
        eta_squared: share of the split itself, debiased. The split was chosen to make it large, so
            it is high on pure noise too.
        cross_validated: mean of two shares: splits chosen on the blocks of even number, measured on
            those of odd number, and the reverse. NaN: too few blocks with examples, or no spread
            beyond noise.
        null: [R] the same of R other splits, each measured on both halves.
        num_splits: how many admissible splits exist, this one included; None: too many to count.
    """

    eta_squared: float
    cross_validated: float
    null: Array
    num_splits: int | None = None

    @property
    def null_mean(self) -> float:
        """NaN without another split."""
        return float(self.null.mean()) if len(self.null) else float("nan")

    @property
    def null_std(self) -> float:
        """NaN with too few other splits for a deviation."""
        return float(self.null.std(ddof=1)) if self.judged else float("nan")

    @property
    def judged(self) -> bool:
        """Whether there are enough other splits to tell this one from chance."""
        return len(self.null) >= FEWEST_SPLITS

    @property
    def beaten(self) -> int:
        """Number of other splits whose share is below the cross-validated one."""
        return int((self.null < self.cross_validated).sum())

    @property
    def p_value(self) -> float:
        """Chance that one of these splits, picked blindly, does as well."""
        return (len(self.null) - self.beaten + 1) / (len(self.null) + 1)

    @property
    def better_than_random(self) -> bool:
        """Whether the cross-validated share beats the null's mean by two standard deviations."""
        return self.judged and self.cross_validated > self.null_mean + 2 * self.null_std


def measure_separation(
    products: BlockProducts,
    weights: Array,
    labels: Labels,
    partition: Callable[[Array], Labels],
    others: npt.NDArray[np.intp],
    *,
    similarity: Similarity = "cosine",
    debias: Debias = "blocks",
) -> Separation:
    """Judges a split by splits of half the examples and by other splits.

    Sums of squares are always debiased (U on the diagonal). The vectors are divided by the lengths
    that all blocks give (similarity "cosine") or left as they are ("gram"); the sums are divided by
    the total that all blocks give.

    Args:
        products: products of the datasets' block sums.
        weights: [N] token shares, sum 1.
        labels: [N] the split made on ``conflict_of(products, ...).similarity``.
        partition: makes a split [N] from such a matrix [N, N], here of half the examples.
        others: [R, N] labels of R distinct balanced splits, ``labels`` not among them.
        similarity: as in ``conflict_of``.
        debias: of the matrices that ``partition`` gets.
    """
    unknown = Separation(float("nan"), float("nan"), np.full(len(others), np.nan))
    total = resolved_spread(products, weights, similarity)
    if not total > 0:
        return unknown
    whole = mean_gram(products, "blocks")
    square = _squares(whole, similarity)
    eta = between_sum(double_center(whole.cosine(square), weights), weights, labels) / total
    halves = half_grams(products, "blocks")
    if not all(np.isfinite(half.gram).all() for half in halves):
        return replace(unknown, eta_squared=eta)
    judges = [double_center(half.cosine(square), weights) for half in halves]
    lengths = mean_gram(products, debias).square if similarity == "cosine" else square
    matrices = [
        similarity_matrix(half, similarity, debias, lengths)
        for half in half_grams(products, debias)
    ]

    def crossed(from_even: npt.NDArray[np.intp], from_odd: npt.NDArray[np.intp]) -> Array:
        on_odd = between_sums(judges[1], weights, from_even)
        on_even = between_sums(judges[0], weights, from_odd)
        return (on_odd + on_even) / (2 * total)

    found = [np.asarray(partition(matrix))[None] for matrix in matrices]
    return Separation(
        eta_squared=eta,
        cross_validated=float(crossed(*found)[0]),
        null=crossed(others, others),
    )


def share_between(
    products: BlockProducts, weights: Array, labels: Labels, similarity: Similarity = "cosine"
) -> float:
    """Debiased eta squared of any split; NaN where the sum does not stand out of its noise."""
    total = resolved_spread(products, weights, similarity)
    whole = mean_gram(products, "blocks")
    centered = double_center(whole.cosine(_squares(whole, similarity)), weights)
    return between_sum(centered, weights, labels) / total


def resolved_spread(
    products: BlockProducts, weights: Array, similarity: Similarity = "cosine"
) -> float:
    """Weighted sum of squares of all datasets around their mean.

    NaN where its lower bound (95 %, one-sided, by block jackknife) is not above zero.
    """

    def spread(gram: MeanGram) -> float:
        square = _squares(gram, similarity)
        return total_sum(double_center(gram.cosine(square), weights), weights)

    total = spread(mean_gram(products, "blocks"))
    folds = np.array([spread(fold) for fold in left_out_grams(products, "blocks")])
    folds = folds[np.isfinite(folds)]  # a dataset with examples in two blocks loses some
    if len(folds) < 2:
        return float("nan")
    bound = one_sided_t(len(folds) - 1) * float(jackknife_error(folds))
    return total if total > max(bound, 0.0) else float("nan")


def _squares(gram: MeanGram, similarity: Similarity) -> Array:
    return gram.square if similarity == "cosine" else np.ones(len(gram.square))


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


def conflicting_pairs(surely_negative: npt.NDArray[np.bool_], labels: Labels) -> tuple[int, int]:
    """Number of pairs that surely conflict, within groups and across groups.

    Datasets whose rows are spread over the groups (-1) meet all others within each group.
    """
    labels = np.asarray(labels)
    apart = (labels[:, None] != labels) & (labels[:, None] >= 0) & (labels >= 0)
    pairs = np.triu(surely_negative, 1)
    across = int((pairs & apart).sum())
    return int(pairs.sum()) - across, across


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else float("nan")
