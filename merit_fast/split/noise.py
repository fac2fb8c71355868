"""Gradient noise scale of datasets and of their mixture (McCandlish et al. 2018, arXiv 1812.06162).

    B = tr(Sigma) / |G|^2

G is the mean gradient and Sigma the covariance of what one example adds to a step: at a batch of B
examples, noise and signal are equally large. Pure NumPy.

A step over examples r descends sum_r w_r g_r / sum_r w_r, w the target tokens or 1. Its noise is,
to first order, that of w (g - G) / mean w, so tr(Sigma) = E |w (g - G)|^2 / (mean w)^2.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import jackknife_error
from merit_fast.split.conflict import MeanGram, left_out_grams, mean_gram
from merit_fast.split.moments import BlockProducts
from merit_fast.split.student import one_sided_t

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NoiseScales:
    """Noise scales in examples, with block-jackknife standard errors; NaN: not resolved.

    Attributes:
        datasets: [N].
        errors: [N].
        mixture: of a batch whose examples come from dataset i with probability weight_i.
        mixture_error: of ``mixture``.
    """

    datasets: Array
    errors: Array
    mixture: float
    mixture_error: float


def noise_scales(
    products: BlockProducts,
    square_norms: Array,
    weights: Array,
    resolved: npt.NDArray[np.bool_],
    square_weights: Array | None = None,
) -> NoiseScales:
    """Computes noise scales from block sums.

        l_i = mean of w,  q_i = mean of |w g|^2 / l_i^2,  v_i = mean of w^2 / l_i^2
        B_i = (q_i - v_i U_i) / U_i                            U_i the unbiased |mean gradient|^2
        B   = sum_i w_i l_i / L (q_i - 2 v_i <G_i, G> + v_i |G|^2) / |G|^2,  1 / L = sum_i w_i / l_i
              |G|^2 = sum_ij w_i w_j gram_ij, U on the diagonal

    Where each example counts 1, l = v = L = 1 and B = (sum_i w_i q_i - |G|^2) / |G|^2. With tokens,
    an example's length is taken to tell nothing of its gradient within its dataset.

    Args:
        products: products of the datasets' block sums.
        square_norms: [N, G] sums of |w s|^2; NaN where they are not known (sums of a backward
            pass).
        weights: [N] token shares w_i, sum 1: a batch has them in expectation.
        resolved: [N] whether a dataset's signal stands out of its noise.
        square_weights: [N, G] sums of w^2; None: each example counts 1.
    """
    counts = products.counts
    squares = counts if square_weights is None else square_weights
    everything = _Moments.of(*(v.sum(1) for v in (counts, products.weights, square_norms, squares)))
    columns = [
        (values.sum(1, keepdims=True) - values).T
        for values in (counts, products.weights, square_norms, squares)
    ]
    whole = mean_gram(products, "blocks")
    folds = left_out_grams(products, "blocks")
    pairs = list(zip(folds, map(_Moments.of, *columns), strict=True))
    error = jackknife_error(np.stack([_of_datasets(fold, rest) for fold, rest in pairs]))
    signal = _signal(whole, weights)
    bound = one_sided_t(len(folds) - 1)
    signal_error = float(jackknife_error(np.array([_signal(fold, weights) for fold in folds])))
    mixture = np.array([_of_mixture(fold, rest, weights) for fold, rest in pairs])
    known = signal > bound * signal_error and bool(np.isfinite(everything.norm).all())
    return NoiseScales(
        datasets=np.where(resolved, _of_datasets(whole, everything), np.nan),
        errors=np.where(resolved, error, np.nan),
        mixture=_of_mixture(whole, everything, weights) if known else float("nan"),
        mixture_error=float(jackknife_error(mixture)) if known else float("nan"),
    )


@dataclass(frozen=True)
class _Moments:
    """Means over the examples of every dataset [N]: l, q and v."""

    weight: Array
    norm: Array
    square: Array

    @classmethod
    def of(cls, counts: Array, weights: Array, square_norms: Array, squares: Array) -> "_Moments":
        mean = weights / counts
        return cls(mean, square_norms / counts / mean**2, squares / counts / mean**2)


def _of_datasets(gram: MeanGram, moments: _Moments) -> Array:
    signal = np.diag(gram.gram)
    noise = moments.norm - moments.square * signal
    return np.asarray(noise / np.where(signal > 0, signal, np.nan))


def _of_mixture(gram: MeanGram, moments: _Moments, weights: Array) -> float:
    signal = _signal(gram, weights)
    if not signal > 0:
        return float("nan")
    to_mean = gram.gram @ weights
    noise = moments.norm + moments.square * (signal - 2 * to_mean)
    share = weights * moments.weight * (weights / moments.weight).sum()
    return float(share @ noise) / signal


def _signal(gram: MeanGram, weights: Array) -> float:
    return float(weights @ gram.gram @ weights)
