"""Fits losses of merges: a parabola along the scale, a quadratic over the weights.

Pure NumPy: losses come in; points to evaluate and their minimum go out.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = tuple[float, ...]

SCALES = (0.5, 1.0, 1.5)
SCALE_RANGE = (0.0, 2.0)  # where the parabola's minimum may lie
REACH = 0.5  # share of the step from the start to a single branch at which weights are tried
DIGITS = 4  # decimals of a chosen number; the losses do not resolve more
_STEPS = 20_000


def parabola_minimum(scales: Sequence[float], losses: Sequence[float]) -> float | None:
    """The minimum of the parabola through three points, clipped to ``SCALE_RANGE``.

    Args:
        scales: three scales, rising.
        losses: their losses.

    Returns:
        The minimum; None if the parabola has none.
    """
    x0, x1, x2 = scales
    y0, y1, y2 = losses
    first_slope = (y1 - y0) / (x1 - x0)
    second_slope = (y2 - y1) / (x2 - x1)
    bend = (second_slope - first_slope) / (x2 - x0)
    if not (np.isfinite(bend) and bend > 0):
        return None
    vertex = (x0 + x1) / 2 - first_slope / (2 * bend)
    return round(float(np.clip(vertex, *SCALE_RANGE)), DIGITS)


def weight_points(start: Weights) -> list[Weights]:
    """K (K + 1) / 2 points around ``start``: towards every branch, then every midpoint of two.

    They are Scheffe's {K, 2} simplex lattice (1958), contracted towards the start. There are as
    many points as a quadratic over weights of sum 1 has coefficients, and none lies outside the
    simplex.
    """
    w = np.array(start)
    units = np.eye(len(start))
    corners = [*units, *(0.5 * (a + b) for a, b in itertools.combinations(units, 2))]
    return [tuple(map(float, w + REACH * (corner - w))) for corner in corners]


def fit_weights(
    start: Weights, start_loss: float, losses: Sequence[float], ridge: float
) -> Weights | None:
    """The weights w >= 0 of sum 1 that minimise a quadratic fit to the losses, pulled to the start:

        g u + 1/2 u H u + 1/2 ridge (tr H / (K - 1)) |u|^2,   u = w - start

    g and H, over u of sum 0, are the least squares fit to the losses at ``weight_points`` that
    passes through the start's loss; negative eigenvalues of H count as 0.

    Returns:
        K weights of ``DIGITS`` decimals; None if there is only one branch, if a loss is not finite,
        or if no direction curves upwards.
    """
    count = len(start)
    if count < 2 or not np.isfinite([start_loss, *losses]).all():
        return None
    basis = _zero_sum_basis(count)
    steps = (np.array(weight_points(start)) - np.array(start)) @ basis  # [P, K - 1]
    gradient, hessian = _quadratic(steps, np.array(losses) - start_loss)
    values, vectors = np.linalg.eigh(hessian)
    values = np.maximum(values, 0.0)
    if values.mean() <= 0:
        return None
    curvature = (vectors * (values + ridge * values.mean())) @ vectors.T
    return _rounded(
        _minimum_on_simplex(basis @ gradient, basis @ curvature @ basis.T, np.array(start))
    )


def _quadratic(steps: Array, rises: Array) -> tuple[Array, Array]:
    """Fits g and a symmetric H to rises = steps g + 1/2 steps H steps."""
    width = steps.shape[1]
    rows, columns = np.triu_indices(width)
    halves = np.where(rows == columns, 0.5, 1.0)
    terms = np.concatenate([steps, steps[:, rows] * steps[:, columns] * halves], axis=1)
    coefficients = np.linalg.lstsq(terms, rises, rcond=None)[0]
    hessian = np.zeros((width, width))
    hessian[rows, columns] = hessian[columns, rows] = coefficients[width:]
    return coefficients[:width], hessian


def _zero_sum_basis(count: int) -> Array:
    """Helmert's [K, K - 1] orthonormal columns of sum 0."""
    basis = np.zeros((count, count - 1))
    for j in range(1, count):
        basis[:j, j - 1] = 1.0
        basis[j, j - 1] = -float(j)
        basis[:, j - 1] /= np.sqrt(j * (j + 1.0))
    return basis


def _minimum_on_simplex(gradient: Array, curvature: Array, start: Array) -> Array:
    """Minimises g u + 1/2 u M u over w = start + u in the simplex by projected gradient steps."""
    w = start.copy()
    step = 1.0 / float(np.linalg.eigvalsh(curvature)[-1])
    for _ in range(_STEPS):
        moved = _onto_simplex(w - step * (gradient + curvature @ (w - start)))
        if np.abs(moved - w).max() < 1e-12:
            return moved
        w = moved
    return w


def _onto_simplex(point: Array) -> Array:
    """The nearest point with w >= 0 and sum w = 1 (Duchi et al. 2008)."""
    falling = np.sort(point)[::-1]
    excess = (np.cumsum(falling) - 1.0) / np.arange(1, len(point) + 1)
    nearest: Array = np.maximum(point - excess[np.flatnonzero(falling > excess)[-1]], 0.0)
    return nearest


def _rounded(weights: Array) -> Weights:
    """Rounds to ``DIGITS`` decimals; the largest weight takes the rest, so that the sum is 1."""
    rounded = [round(float(w), DIGITS) for w in weights]
    largest = int(weights.argmax())
    rounded[largest] = round(1.0 - sum(w for k, w in enumerate(rounded) if k != largest), DIGITS)
    return tuple(rounded)
