"""Centred similarities and their sums of squares between groups. Pure NumPy."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Labels = Sequence[int] | npt.NDArray[np.intp]


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
