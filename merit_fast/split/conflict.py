"""Inner products and cosines of mean gradients, their errors and signal. Pure NumPy, no files.

The mean sketch of dataset i is T_i / n_i. Its naive square R = |T|^2 / n^2 is high by tr(Sigma) /
n, the sampling noise of the mean with itself; pairs of different blocks are free of it
(U-statistic):

    U = (|T|^2 - sum_g |S_g|^2) / (n^2 - sum_g n_g^2),   E U = |mean gradient|^2

with n_g the sum of the block's weights: its target tokens, or its examples. Inner products of
datasets that share no row need no correction, those of others take pairs of different blocks too.
Cosines are divided by the square roots of U.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import jackknife_error, signal_fractions, unbiased_square
from merit_fast.split.moments import BlockProducts
from merit_fast.split.student import one_sided_t, surely_negative

Array = npt.NDArray[np.float64]
Labels = Sequence[int] | npt.NDArray[np.intp]
Similarity = Literal["cosine", "gram"]
Debias = Literal["blocks", "none"]

_FLOOR = 0.1  # of R: U may be as low as noise makes it, below zero too
_CLIP = 1.2  # estimates of a cosine scatter around it; a clip at 1 would bias those near 1
_POWER = NormalDist().inv_cdf(0.8)
_FEWEST = 32


@dataclass(frozen=True)
class Conflict:
    """Conflicts of N datasets.

    Errors are block-jackknife standard errors; NaN marks unresolved values.

    Attributes:
        gram: [N, N] inner products of the mean gradients; the diagonal unbiased, below 0 now and
            then.
        cosine: [N, N], diagonal 1. Debiased ones lie within +-1.2; NaN with a dataset whose signal
            is not resolved.
        error: [N, N] of ``cosine``, diagonal 0.
        surely_negative: [N, N] whether a cosine is below zero beyond doubt, though many pairs were
            tested.
        similarity: [N, N] input of a partition, always finite: ``gram``, or the cosines with norms
            of at least 0.1 of R, so that those of unresolved datasets stay small.
        norm: [N] length of each mean gradient, debiased or not; NaN where its signal is not
            resolved.
        signal_fraction: [N] U / R: 1 is noiseless, 0 all noise, not clipped.
        signal_error: [N].
        more_examples: [N] 0 where the lower bound (95 %, one-sided) of the signal fraction is above
            zero; else about the number of further examples that would lift it there four times in
            five. Where the fraction is below its error this number is a lower bound.
    """

    gram: Array
    cosine: Array
    error: Array
    surely_negative: npt.NDArray[np.bool_]
    similarity: Array
    norm: Array
    signal_fraction: Array
    signal_error: Array
    more_examples: npt.NDArray[np.int64]

    @property
    def resolved(self) -> npt.NDArray[np.bool_]:
        """[N] whether a dataset's signal stands out of its noise."""
        return np.asarray(self.more_examples == 0)

    @property
    def negative_pair_fraction(self) -> float:
        """Share of pairs with a negative cosine among the known ones; 0 if none is."""
        pairs = self.cosine[np.triu_indices(len(self.cosine), 1)]
        known = pairs[~np.isnan(pairs)]
        return float((known < 0).mean()) if len(known) else 0.0

    @property
    def certain_negative_fraction(self) -> float:
        """Share of pairs whose cosine is negative by two standard errors, among the known ones."""
        upper = np.triu_indices(len(self.cosine), 1)
        pairs = self.cosine[upper]
        errors = self.error[upper]
        known = ~np.isnan(pairs)
        return float((pairs + 2 * errors < 0)[known].mean()) if known.any() else 0.0


def conflict_of(
    products: BlockProducts, *, similarity: Similarity = "cosine", debias: Debias
) -> Conflict:
    """Computes everything that makes and judges a split from the products of block sums. O(G N^2).

    The jackknife leaves out block g of every dataset at once, g = 1..G (Quenouille 1949; Tukey
    1958): datasets are independent, so this holds for pairs too.
    """
    whole = mean_gram(products, debias)
    folds = left_out_grams(products, debias)
    fraction, signal_error = signal_fractions(products.within, products.weights)
    more = _more_examples(fraction, signal_error, products.counts)
    error = jackknife_error(np.stack([fold.cosine() for fold in folds]))
    np.fill_diagonal(error, 0.0)
    unknown = (more > 0) if debias == "blocks" else np.zeros(len(more), bool)
    hidden = unknown[:, None] | unknown
    cosine = similarity_matrix(whole, "cosine", debias)
    return Conflict(
        gram=whole.gram,
        cosine=np.where(hidden, np.nan, cosine),
        error=np.where(hidden, np.nan, error),
        surely_negative=_conflicts(cosine, error, hidden, len(folds) - 1),
        similarity=similarity_matrix(whole, similarity, debias),
        norm=np.where(unknown, np.nan, np.sqrt(whole.square)),
        signal_fraction=fraction,
        signal_error=signal_error,
        more_examples=more,
    )


def _conflicts(
    cosine: Array, error: Array, hidden: npt.NDArray[np.bool_], freedom: int
) -> npt.NDArray[np.bool_]:
    """[N, N] pairs of known cosine that surely conflict."""
    sure = np.zeros(cosine.shape, bool)
    known = np.triu(~hidden & np.isfinite(error), 1)
    sure[known] = surely_negative(cosine[known], error[known], freedom)
    return np.asarray(sure | sure.T)


@dataclass(frozen=True)
class MeanGram:
    """Inner products of means.

    Attributes:
        gram: [N, N].
        square: [N] squared lengths for cosines: positive, or 0 for a zero mean.
    """

    gram: Array
    square: Array

    def cosine(self, square: Array | None = None) -> Array:
        """[N, N] gram / (|i| |j|), diagonal too, not clipped; 0 where a gradient is 0."""
        length = np.sqrt(self.square if square is None else square)
        scale = np.where(length > 0, length, 1.0)
        return np.asarray(self.gram / np.outer(scale, scale))


def similarity_matrix(
    gram: MeanGram, similarity: Similarity, debias: Debias, square: Array | None = None
) -> Array:
    """Input of a partition: finite cosines, clipped and with diagonal 1, or the Gram itself.

    A pair of which too few blocks tell nothing counts as 0.
    """
    if similarity == "gram":
        return np.nan_to_num(gram.gram, nan=0.0)
    bound = _CLIP if debias == "blocks" else 1.0
    cosine = np.clip(np.nan_to_num(gram.cosine(square), nan=0.0), -bound, bound)
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(cosine)


def mean_gram(products: BlockProducts, debias: Debias) -> MeanGram:
    """Gram of the means over all blocks."""
    return _mean_gram(products.total, products, np.arange(products.counts.shape[1]), debias)


def half_grams(products: BlockProducts, debias: Debias) -> tuple[MeanGram, MeanGram]:
    """Grams of the means over the blocks of even and of odd number, independent of each other.

    NaN on a diagonal: the half has one block with examples.
    """
    blocks = np.arange(products.counts.shape[1])
    even, odd = (_mean_gram(products.halves[h], products, blocks[h::2], debias) for h in range(2))
    return even, odd


def left_out_similarities(
    products: BlockProducts, similarity: Similarity, debias: Debias
) -> list[Array]:
    """``Conflict.similarity`` with block g of every dataset left out, g = 1..G."""
    return [
        similarity_matrix(fold, similarity, debias) for fold in left_out_grams(products, debias)
    ]


def cosine_matrix(rows: Array) -> Array:
    """[N, N] cosines of the rows [N, D]; a zero row has cosine 0 with all others."""
    gram = rows @ rows.T
    return similarity_matrix(MeanGram(gram, np.diag(gram)), "cosine", "none")


def center_columns(matrix: Array) -> Array:
    """``matrix - matrix.mean(0)``, as published: its rows are points."""
    return matrix - _sums(matrix.T) / len(matrix)


def double_center(matrix: Array, weights: Array) -> Array:
    """Computes J M J^T with J = I - 1 w^T: the Gram after the weighted mean is subtracted.

    w sums to 1.

    M is symmetric. Sums are exact before their one rounding, so permuting the datasets permutes the
    bits.
    """
    to_mean = _sums(matrix * weights)
    mean = math.fsum((to_mean * weights).tolist())
    return np.asarray(matrix - (to_mean[:, None] + to_mean) + mean)


def between_sums(centered: Array, weights: Array, splits: npt.NDArray[np.intp]) -> Array:
    """[R] between-group sums of squares of vectors z with Gram ``centered``.

        sum_k |sum_i s_ik w_i z_i|^2 / sum_i s_ik w_i

    The terms are rounded to integers of which no sum exceeds 2^53, so the order of the datasets
    does not change a bit; this costs some N^2 2^-53 of the sum of their sizes.

    splits: [R, N] labels 0..K-1 (then s_ik is 1 for i's group, else 0), or -1 for rows spread over
    all groups (s_ik = 1/K).
    """
    splits = np.asarray(splits)
    num_groups = int(splits.max(initial=0)) + 1
    whole = num_groups if (splits < 0).any() else 1  # so that a share is an integer too
    inner = centered * np.outer(weights, weights)
    unit = _unit(float(np.abs(inner).sum()) * whole**2)
    inner = np.rint(inner / unit)
    fine = _unit(float(weights.sum()) * whole)
    masses = np.rint(weights / fine)
    groups = np.arange(num_groups)
    sums = np.empty(len(splits))
    for i, labels in enumerate(splits):
        members = np.where(labels[:, None] < 0, 1.0, whole * (labels[:, None] == groups))
        square = np.einsum("ik,ik->k", members, inner @ members) * (unit / whole**2)
        mass = (masses @ members) * (fine / whole)
        sums[i] = math.fsum((square[mass > 0] / mass[mass > 0]).tolist())
    return sums


def between_sum(centered: Array, weights: Array, labels: Labels) -> float:
    """Computes ``between_sums`` of one split [N]."""
    return float(between_sums(centered, weights, np.asarray(labels)[None])[0])


def _unit(size: float) -> float:
    """Least power of two of which 2^52 make ``size``."""
    return math.ldexp(1.0, math.frexp(size)[1] - 52) if 0 < size < math.inf else 1.0


def total_sum(centered: Array, weights: Array) -> float:
    """sum_i w_i |z_i|^2."""
    return math.fsum((weights * np.diag(centered)).tolist())


def _sums(rows: Array) -> Array:
    """Sum of every row, rounded once, so independent of the order."""
    return np.array([math.fsum(row) for row in rows.tolist()])


def _mean_gram(
    products: Array, source: BlockProducts, blocks: npt.NDArray[np.intp], debias: Debias
) -> MeanGram:
    """Gram of the means over some blocks, from inner products [N, N] of their sums."""
    weights = source.weights[:, blocks]
    number = weights.sum(1)
    number = np.where(number > 0, number, np.nan)  # a half may lack a dataset of few rows
    naive = np.diag(products) / number**2
    if debias == "none":
        return MeanGram(products / np.outer(number, number), naive)
    independent, pairs = source.independent(products, blocks)
    gram = independent / np.where(pairs > 0, pairs, np.nan)
    within_blocks = np.einsum("ngg->ng", source.within)[:, blocks].sum(1)
    unbiased = unbiased_square(np.diag(products), within_blocks, number, (weights**2).sum(1))
    np.fill_diagonal(gram, unbiased)
    return MeanGram(gram, np.maximum(unbiased, _FLOOR * naive))


def left_out_grams(products: BlockProducts, debias: Debias) -> list[MeanGram]:
    blocks = np.arange(products.counts.shape[1])
    return [
        _mean_gram(products.left_out[g], products, np.delete(blocks, g), debias) for g in blocks
    ]


def _more_examples(fraction: Array, error: Array, counts: Array) -> npt.NDArray[np.int64]:
    """[N] examples to add. While noise prevails the fraction grows as n, its error hardly."""
    number = counts.sum(1)
    blocks = (counts > 0).sum(1)
    bound = np.array([one_sided_t(int(count) - 1) if count > 1 else np.inf for count in blocks])
    larger = np.maximum(fraction, error)
    wanted = number * (bound + _POWER) * error / np.where(larger > 0, larger, np.nan)
    known = np.isfinite(wanted)
    more = np.where(
        known, np.ceil(np.where(known, wanted, 0.0) - number), np.maximum(_FEWEST - number, number)
    )
    resolved = fraction - np.where(error > 0, bound, 0.0) * error > 0
    return np.where(resolved, 0, np.maximum(more, 1)).astype(np.int64)
