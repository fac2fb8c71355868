"""Numbers from sketch states: inner products and cosines of mean gradients, their errors, signal. Pure NumPy, no files.

The mean sketch of dataset i is T_i / n_i. Its naive square R = |T|^2 / n^2 is high by tr(Sigma) / n, the sampling noise
of the mean with itself; pairs of different blocks are free of it (U-statistic):

    U = (|T|^2 - sum_g |S_g|^2) / (n^2 - sum_g n_g^2),   E U = |mean gradient|^2

Inner products of different datasets need no correction, their cosines do: by the square roots of U.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import jackknife_error, signal_fractions, unbiased_square
from merit_fast.split.moments import BlockProducts, block_products

Array = npt.NDArray[np.float64]
Labels = Sequence[int] | npt.NDArray[np.intp]
Similarity = Literal["cosine", "gram"]
Debias = Literal["blocks", "none"]
Center = Literal["tokens", "columns"]

_FLOOR = 0.1  # of R: U may be as low as noise makes it, below zero too
_CLIP = 1.2  # estimates of a cosine scatter around it; a clip at 1 would bias those near 1
_CONFIDENCE = NormalDist().inv_cdf(0.95)
_POWER = NormalDist().inv_cdf(0.8)
_FEWEST = 32


@dataclass(frozen=True)
class Conflict:
    """N datasets. Errors are block-jackknife standard errors; NaN is what the examples do not tell.

    Attributes:
        gram: [N, N] inner products of the mean gradients; the diagonal unbiased, below 0 now and then.
        gram_error: [N, N].
        cosine: [N, N], diagonal 1. Debiased ones lie within +-1.2; NaN with a dataset whose signal is not resolved.
        error: [N, N] of ``cosine``, diagonal 0.
        similarity: [N, N] what a partition works on, always finite: ``gram``, or the cosines with norms of at least 0.1
            of R, so that those of unresolved datasets stay small.
        norm: [N] length of each mean gradient, debiased or not; NaN where its signal is not resolved.
        signal_fraction: [N] U / R: 1 is noiseless, 0 all noise, not clipped.
        signal_error: [N].
        more_examples: [N] 0 where the lower bound (95 %, one-sided) of the signal fraction is above zero; else about
            how many more examples would lift it there four times in five. Where the fraction is below its error this is
            a least number.
    """

    gram: Array
    gram_error: Array
    cosine: Array
    error: Array
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
        """Share of dataset pairs with a negative cosine, of those whose cosine is known; 0 if none is."""
        pairs = self.cosine[np.triu_indices(len(self.cosine), 1)]
        known = pairs[~np.isnan(pairs)]
        return float((known < 0).mean()) if len(known) else 0.0

    @property
    def certain_negative_fraction(self) -> float:
        """The same, of cosines negative by two standard errors."""
        upper = np.triu_indices(len(self.cosine), 1)
        pairs, errors = self.cosine[upper], self.error[upper]
        known = ~np.isnan(pairs)
        return float((pairs + 2 * errors < 0)[known].mean()) if known.any() else 0.0

    def describe_signal(self, dataset: int) -> str:
        """A few words on one dataset's signal, or on what it would take to know it."""
        fraction, error = self.signal_fraction[dataset], self.signal_error[dataset]
        if self.resolved[dataset]:
            return f"signal fraction {fraction:.2f} +- {error:.2f}"
        about = "about" if fraction > error else "at least"
        return f"not resolvable: needs {about} {self.more_examples[dataset]} more examples"


def measure_conflict(
    block_sums: Any,
    block_counts: npt.NDArray[Any],
    *,
    similarity: Similarity = "cosine",
    debias: Debias = "none",
) -> Conflict:
    """``conflict_of(block_products(...))``; by default the published, naive cosines.

    Args:
        block_sums: [N, G, D] summed sketches of each dataset's blocks.
        block_counts: [N, G] examples in them; every dataset needs two blocks or more.
        similarity: what ``Conflict.similarity`` holds.
        debias: "blocks": by the U-statistic; "none": R in the place of U everywhere but in the signal fraction.
    """
    return conflict_of(
        block_products(block_sums, block_counts), similarity=similarity, debias=debias
    )


def conflict_of(
    products: BlockProducts, *, similarity: Similarity = "cosine", debias: Debias
) -> Conflict:
    """Everything a split is made of and judged by, from the products of block sums. O(G N^2).

    The jackknife leaves out block g of every dataset at once, g = 1..G (Quenouille 1949; Tukey 1958): datasets are
    independent, so this holds for pairs too.
    """
    whole, folds = mean_gram(products, debias), _left_out_grams(products, debias)
    fraction, signal_error = signal_fractions(products.within, products.counts)
    more = _more_examples(fraction, signal_error, products.counts)
    error = jackknife_error(np.stack([fold.cosine() for fold in folds]))
    np.fill_diagonal(error, 0.0)
    unknown = (more > 0) if debias == "blocks" else np.zeros(len(more), bool)
    hidden = unknown[:, None] | unknown
    cosine = similarity_matrix(whole, "cosine", debias)
    return Conflict(
        gram=whole.gram,
        gram_error=jackknife_error(np.stack([fold.gram for fold in folds])),
        cosine=np.where(hidden, np.nan, cosine),
        error=np.where(hidden, np.nan, error),
        similarity=similarity_matrix(whole, similarity, debias),
        norm=np.where(unknown, np.nan, np.sqrt(whole.square)),
        signal_fraction=fraction,
        signal_error=signal_error,
        more_examples=more,
    )


@dataclass(frozen=True)
class MeanGram:
    """gram: [N, N] inner products of means. square: [N] their squares, as cosines take them: positive, or 0 for 0."""

    gram: Array
    square: Array

    def cosine(self, square: Array | None = None) -> Array:
        """[N, N] gram / (|i| |j|), diagonal too, not clipped; 0 for a dataset whose gradient is 0."""
        length = np.sqrt(self.square if square is None else square)
        scale = np.where(length > 0, length, 1.0)
        return np.asarray(self.gram / np.outer(scale, scale))


def similarity_matrix(
    gram: MeanGram, similarity: Similarity, debias: Debias, square: Array | None = None
) -> Array:
    """What a partition works on: finite cosines, clipped and with diagonal 1, or the Gram itself."""
    if similarity == "gram":
        return gram.gram.copy()
    bound = _CLIP if debias == "blocks" else 1.0
    cosine = np.clip(gram.cosine(square), -bound, bound)
    np.fill_diagonal(cosine, 1.0)
    return np.asarray(cosine)


def mean_gram(products: BlockProducts, debias: Debias) -> MeanGram:
    """Of all blocks."""
    return _mean_gram(products.total, products, np.arange(products.counts.shape[1]), debias)


def half_grams(products: BlockProducts, debias: Debias) -> tuple[MeanGram, MeanGram]:
    """Of the blocks of even and of odd number: independent of each other. NaN on a diagonal: one block in that half."""
    blocks = np.arange(products.counts.shape[1])
    even, odd = (_mean_gram(products.halves[h], products, blocks[h::2], debias) for h in range(2))
    return even, odd


def left_out_similarities(
    products: BlockProducts, similarity: Similarity, debias: Debias
) -> list[Array]:
    """``Conflict.similarity`` with block g of every dataset left out, g = 1..G."""
    return [
        similarity_matrix(fold, similarity, debias) for fold in _left_out_grams(products, debias)
    ]


def cosine_matrix(rows: Array) -> Array:
    """[N, N] cosines of the rows [N, D]; a zero row has cosine 0 with all others."""
    gram = rows @ rows.T
    return similarity_matrix(MeanGram(gram, np.diag(gram)), "cosine", "none")


def center_matrix(matrix: Array, weights: Array, center: Center) -> Array:
    """``double_center`` ("tokens"), or the published ``matrix - matrix.mean(0)`` whose rows are points ("columns")."""
    if center == "tokens":
        return double_center(matrix, weights)
    return matrix - _sums(matrix.T) / len(matrix)


def double_center(matrix: Array, weights: Array) -> Array:
    """J M J^T with J = I - 1 w^T: the Gram of what remains when the weighted mean is taken off. w sums to 1.

    M is symmetric. Sums are exact before their one rounding, so permuting the datasets permutes the bits.
    """
    to_mean = _sums(matrix * weights)
    mean = math.fsum((to_mean * weights).tolist())
    return np.asarray(matrix - (to_mean[:, None] + to_mean) + mean)


def between_sum(centered: Array, weights: Array, groups: Labels) -> float:
    """sum_k |sum_i s_ik w_i z_i|^2 / sum_i s_ik w_i of vectors z with Gram ``centered``: between-group sum of squares.

    groups: [N] 0..K-1 (then s_ik is 1 for i's group, else 0), or -1 for rows spread over all groups (s_ik = 1/K).
    """
    labels, parts = np.asarray(groups), []
    count = int(labels.max(initial=0)) + 1
    for group in range(count):
        inside = np.flatnonzero((labels == group) | (labels < 0))
        weight = np.where(labels[inside] < 0, weights[inside] / count, weights[inside])
        inner = _sums(centered[np.ix_(inside, inside)] * weight) * weight
        if len(inside):
            parts.append(math.fsum(inner.tolist()) / math.fsum(weight.tolist()))
    return math.fsum(parts)


def total_sum(centered: Array, weights: Array) -> float:
    """sum_i w_i |z_i|^2."""
    return math.fsum((weights * np.diag(centered)).tolist())


def eta_squared(centered: Array, weights: Array, groups: Labels) -> float:
    """Between-group share of the weighted sum of squares, in [0, 1] for a Gram of vectors; 0 if nothing varies."""
    total = total_sum(centered, weights)
    return between_sum(centered, weights, groups) / total if total > 0 else 0.0


def _sums(rows: Array) -> Array:
    """Sum of every row, rounded once: no order."""
    return np.array([math.fsum(row) for row in rows.tolist()])


def _mean_gram(
    products: Array, source: BlockProducts, blocks: npt.NDArray[np.intp], debias: Debias
) -> MeanGram:
    """From inner products [N, N] of the sums of some blocks."""
    counts = source.counts[:, blocks]
    number = counts.sum(1)
    gram = products / np.outer(number, number)
    naive = np.diag(gram).copy()
    if debias == "none":
        return MeanGram(gram, naive)
    own = np.einsum("ngg->ng", source.within)[:, blocks].sum(1)
    unbiased = unbiased_square(np.diag(products), own, number, (counts**2).sum(1))
    np.fill_diagonal(gram, unbiased)
    return MeanGram(gram, np.maximum(unbiased, _FLOOR * naive))


def _left_out_grams(products: BlockProducts, debias: Debias) -> list[MeanGram]:
    blocks = np.arange(products.counts.shape[1])
    return [
        _mean_gram(products.left_out[g], products, np.delete(blocks, g), debias) for g in blocks
    ]


def _more_examples(fraction: Array, error: Array, counts: Array) -> npt.NDArray[np.int64]:
    """The fraction grows as n while noise prevails, its error hardly."""
    number, blocks = counts.sum(1), (counts > 0).sum(1)
    bound = np.array([_student(int(count) - 1) if count > 1 else np.inf for count in blocks])
    larger = np.maximum(fraction, error)
    wanted = number * (bound + _POWER) * error / np.where(larger > 0, larger, np.nan)
    known = np.isfinite(wanted)
    more = np.where(
        known, np.ceil(np.where(known, wanted, 0.0) - number), np.maximum(_FEWEST - number, number)
    )
    resolved = fraction - np.where(error > 0, bound, 0.0) * error > 0
    return np.where(resolved, 0, np.maximum(more, 1)).astype(np.int64)


def _student(freedom: int) -> float:
    """The 95 % point of Student's t (Abramowitz & Stegun 26.7.5), within 1 % from 3 degrees of freedom on."""
    z, f = _CONFIDENCE, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / f + second / f**2 + third / f**3
