"""Mixture weights under which one step helps all datasets alike: a quadratic programme.

Of all mixtures of the datasets' unit gradients the shortest one is taken: by duality, a step along
it lowers the loss of the worst-served dataset most (Desideri 2012). Pure NumPy.
"""

import numpy as np
import numpy.typing as npt

from merit_fast.block_estimates import jackknife_error
from merit_fast.errors import MeritFastError
from merit_fast.split.conflict import left_out_grams, mean_gram, similarity_matrix
from merit_fast.split.moments import BlockProducts

Array = npt.NDArray[np.float64]

PULL = 0.1  # towards the token shares, as a share of the objective there
_LEAST = 1e-3  # of the objective at the token shares, so that opposite gradients have one answer
_ROUNDING = 1e-10
_PATIENCE = 3


def suggested_shares(
    products: BlockProducts, weights: Array, resolved: npt.NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Computes mixture weights [N] and their block-jackknife standard errors [N].

        minimise  1/2 p^T C p + PULL / 2 * (w^T C w) * sum_i p_i^2 / w_i   over p >= 0, sum p = 1

    C are the debiased cosines with their negative eigenvalues set to zero, w the token shares.

    Args:
        products: products of the datasets' block sums.
        weights: [N] token shares, sum 1.
        resolved: [N] which datasets take part; the weights of the others are NaN.
    """
    chosen = np.flatnonzero(resolved)
    shares = np.full(len(weights), np.nan)
    errors = np.full(len(weights), np.nan)
    if len(chosen) < 2:
        return shares, errors
    own = weights[chosen] / weights[chosen].sum()

    def solve(similarity: Array) -> Array:
        return simplex_minimum(programme(similarity[np.ix_(chosen, chosen)], own))

    grams = [mean_gram(products, "blocks"), *left_out_grams(products, "blocks")]
    whole, *folds = (solve(similarity_matrix(gram, "cosine", "blocks")) for gram in grams)
    shares[chosen] = whole
    errors[chosen] = jackknife_error(np.stack(folds))
    return shares, errors


def programme(cosine: Array, weights: Array) -> Array:
    """Returns the matrix [N, N] of the quadratic programme; positive definite."""
    values, vectors = np.linalg.eigh((cosine + cosine.T) / 2)
    positive = (vectors * np.maximum(values, 0.0)) @ vectors.T
    objective = max(float(weights @ positive @ weights), _LEAST)
    return np.asarray(positive + np.diag(PULL * objective / weights))


def simplex_minimum(matrix: Array) -> Array:
    """Minimises p^T matrix p over p >= 0, sum p = 1, by block pivoting (Kim & Park 2011).

    The p of a solution of matrix x >= 1, x >= 0, x^T (matrix x - 1) = 0 is x / sum x. All entries
    of the wrong sign change sides at once; where that does not lower their number, only the last.

    Args:
        matrix: [N, N] symmetric, positive definite.

    Raises:
        MeritFastError: the conditions (Karush, Kuhn, Tucker) do not hold in the end.
    """
    number = len(matrix)
    free = np.ones(number, bool)
    fewest = number + 1
    patience = _PATIENCE
    x = np.zeros(number)
    for _ in range(100 + 10 * number):
        x = np.zeros(number)
        x[free] = np.linalg.solve(matrix[np.ix_(free, free)], np.ones(int(free.sum())))
        slope = matrix @ x - 1
        wrong = np.where(free, x < 0, slope < -_ROUNDING)
        count = int(wrong.sum())
        if not count:
            break
        if count < fewest:
            fewest = count
            patience = _PATIENCE
        elif patience:
            patience -= 1
        else:
            last = np.flatnonzero(wrong)[-1]
            wrong = np.arange(number) == last
        free ^= wrong
    share = np.asarray(x / x.sum())
    off = kkt_violation(matrix, share)
    if not off <= 1e-8:
        raise MeritFastError(f"split: mixture weights must solve their programme, off by {off:.2g}")
    return share


def kkt_violation(matrix: Array, shares: Array) -> float:
    """Returns how far p is from a minimum over the simplex, relative to the objective.

    At the minimum (matrix p)_i equals p^T matrix p where p_i > 0 and is no less elsewhere.
    """
    slope = matrix @ shares
    value = float(shares @ slope)
    off = np.where(shares > 0, np.abs(slope - value), np.maximum(value - slope, 0.0))
    outside = max(-float(shares.min()), abs(float(shares.sum()) - 1))
    return max(float(off.max()) / value, outside)
