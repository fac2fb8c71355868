"""Gradient noise scale of datasets and of their mixture (McCandlish et al. 2018, arXiv 1812.06162).

    B = tr(Sigma) / |G|^2

G is the mean gradient and Sigma the covariance of an example's gradient: at a batch of B examples,
noise and signal are equally large. Pure NumPy.
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
) -> NoiseScales:
    """Computes noise scales from block sums.

        q_i = sum_g square_norms_ig / n_i                      mean of |g|^2
        B_i = (q_i - U_i) / U_i                                U_i the unbiased |mean gradient|^2
        B   = (sum_i w_i q_i - |G|^2) / |G|^2,   |G|^2 = sum_ij w_i w_j gram_ij, U on the diagonal

    Args:
        products: products of the datasets' block sums.
        square_norms: [N, G] sums of |s|^2; NaN where they are not known (sums of a backward pass).
        weights: [N] token shares, sum 1.
        resolved: [N] whether a dataset's signal stands out of its noise.
    """
    counts = products.counts
    square = square_norms.sum(1)
    mean_square = square / counts.sum(1)
    left_out = (square[:, None] - square_norms) / (counts.sum(1)[:, None] - counts)
    whole = mean_gram(products, "blocks")
    folds = left_out_grams(products, "blocks")
    pairs = list(zip(folds, left_out.T, strict=True))
    error = jackknife_error(np.stack([_of_datasets(fold, mean) for fold, mean in pairs]))
    signal = _signal(whole, weights)
    bound = one_sided_t(len(folds) - 1)
    signal_error = float(jackknife_error(np.array([_signal(fold, weights) for fold in folds])))
    mixture = np.array([_of_mixture(fold, mean, weights) for fold, mean in pairs])
    known = signal > bound * signal_error and bool(np.isfinite(mean_square).all())
    return NoiseScales(
        datasets=np.where(resolved, _of_datasets(whole, mean_square), np.nan),
        errors=np.where(resolved, error, np.nan),
        mixture=_of_mixture(whole, mean_square, weights) if known else float("nan"),
        mixture_error=float(jackknife_error(mixture)) if known else float("nan"),
    )


def _of_datasets(gram: MeanGram, mean_square: Array) -> Array:
    signal = np.diag(gram.gram)
    return np.asarray((mean_square - signal) / np.where(signal > 0, signal, np.nan))


def _of_mixture(gram: MeanGram, mean_square: Array, weights: Array) -> float:
    signal = _signal(gram, weights)
    return (float(weights @ mean_square) - signal) / signal if signal > 0 else float("nan")


def _signal(gram: MeanGram, weights: Array) -> float:
    return float(weights @ gram.gram @ weights)
