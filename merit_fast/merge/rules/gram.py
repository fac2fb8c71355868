"""Coefficients of the methods that weigh whole tensors by lengths and angles.

Each reads a tensor's Gram matrix, taken by an earlier pass, and gives the c_j of sum_j c_j theta_j.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from merit_fast.errors import InputError
from merit_fast.kernels.lazy import np
from merit_fast.merge.parameters import EPS
from merit_fast.merge.rules.values import Coefficients, TensorValues

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"

_COLINEAR = 0.9995  # above this cosine slerp is a lerp, as in mergekit


def slerp_coefficients(gram: Array, t: float) -> Coefficients:
    """(a, b) of a theta_1 + b theta_2 from the Gram matrix [2, 2] of the two tensors.

        omega = arccos(cosine); a = sin((1 - t) omega) / sin(omega); b = sin(t omega) / sin(omega)

    (1 - t, t) where a tensor is zero or the two are nearly colinear (|cosine| > 0.9995).
    """
    lengths = math.sqrt(gram[0, 0]) * math.sqrt(gram[1, 1])
    cosine = gram[0, 1] / lengths if lengths > 0 else 1.0
    if abs(cosine) > _COLINEAR:
        return (1.0 - t, t)
    omega = math.acos(cosine)
    return (math.sin((1.0 - t) * omega) / math.sin(omega), math.sin(t * omega) / math.sin(omega))


def slerp(gram: Array, values: TensorValues) -> Coefficients:
    """``slerp_coefficients`` with the tensor's t."""
    return slerp_coefficients(gram, values.of("t"))


def multislerp(gram: Array, values: TensorValues) -> Coefficients:
    """``multislerp_coefficients`` with the tensor's weights; of deltas, then the base's last."""
    coefficients = multislerp_coefficients(gram, values.weights(), values.name, values.of("eps"))
    return (*coefficients, 1.0 - sum(coefficients)) if values.from_base else coefficients


def model_stock(gram: Array, values: TensorValues) -> Coefficients:
    """``model_stock_coefficients``; the method has no parameters."""
    return model_stock_coefficients(gram)


def multislerp_coefficients(
    gram: Array, weights: Coefficients, name: str, eps: float = EPS.default or 0.0
) -> Coefficients:
    """[K] coefficients of a step along the sphere from the mean direction; ``gram`` is [K, K].

        u_k = x_k / |x_k|; m = normalised sum_k w_k u_k; T = sum_k w_k (u_k - <u_k, m> m); a = |T|
        out = (cos(a) m + sin(a) T / a) * sum_k w_k |x_k|       # eps is added to |x_k| and a

    One model gives itself. Where two cancel in the mean, or all are zero, it is the plain weighted
    sum. The formula is mergekit's, written from its description; the result lies in the span of the
    inputs, so their products suffice.

    Raises:
        InputError: three directions or more cancel: no mean direction.
    """
    if len(gram) == 1:
        return (1.0,)
    w = np.array(weights)
    lengths = np.sqrt(np.diag(gram))
    unit = 1.0 / (lengths + eps)  # u_k = unit_k x_k
    mean = w * unit
    length = math.sqrt(max(float(mean @ gram @ mean), 0.0))
    if length < eps:
        if len(gram) == 2 or not lengths.any():
            return weights
        raise InputError(
            f"merge: {name}: multislerp needs directions that do not cancel, "
            "their mean has length 0"
        )
    mean = mean / length
    along = (unit * (gram @ mean)) @ w  # sum_k w_k <u_k, m>
    tangent = w * unit - along * mean
    angle = math.sqrt(max(float(tangent @ gram @ tangent), 0.0)) + eps
    direction = mean * math.cos(angle) + tangent * (math.sin(angle) / angle)
    return tuple(float(c) for c in direction * float(w @ lengths))


def model_stock_coefficients(gram: Array) -> Coefficients:
    """[K + 1]: K times c / K, then 1 - c for the base, from the deltas' Gram matrix [K, K].

        cosine = mean over pairs; c = K cosine / (1 + (K - 1) cosine)

    A pair with a delta of length zero has cosine 0. Where the deltas cancel (denominator 0), c is
    0.
    """
    count = len(gram)
    lengths = np.sqrt(np.diag(gram))
    scale = np.outer(lengths, lengths)
    cosines = np.where(scale > 0, gram / np.where(scale > 0, scale, 1.0), 0.0)
    mean = float(cosines[np.triu_indices(count, 1)].mean())
    denominator = 1.0 + (count - 1) * mean
    share = count * mean / denominator if denominator > 1e-12 else 0.0
    return (*([share / count] * count), 1.0 - share)


def karcher(gram: Array, values: TensorValues) -> Coefficients:
    """``karcher_coefficients`` with the tensor's limits."""
    return karcher_coefficients(gram, int(values.of("max_iter")), values.of("tol"))


def karcher_coefficients(gram: Array, max_iter: int, tol: float) -> Coefficients:
    """[K] coefficients of the Karcher mean of the directions, times the mean length.

        u_k = x_k / |x_k|; m = normalised mean_k u_k, or u_1 where the mean is shorter than tol
        v = mean_k a_k / sin(a_k) (u_k - cos(a_k) m), a_k the angle between u_k and m
        m = cos|v| m + sin|v| v / |v|, at most max_iter times until |v| < tol
        out = m * mean_k |x_k|

    Tensors shorter than tol have no direction; a model opposite to m, or on it, adds nothing to v.
    Buss & Fillmore 2001; arXiv 2603.04972.
    """
    if len(gram) == 1:
        return (1.0,)
    lengths = np.sqrt(np.diag(gram))
    valid = [k for k in range(len(gram)) if lengths[k] > tol]
    if not valid:
        return (0.0,) * len(gram)
    units = np.zeros((len(valid), len(gram)))
    for row, k in enumerate(valid):
        units[row, k] = 1.0 / lengths[k]
    mean = units.sum(axis=0) / len(valid)
    length = _length(gram, mean)
    mean = units[0].copy() if length < tol else mean / length
    for _ in range(max_iter):
        step = np.zeros(len(gram))
        for unit in units:
            cosine = min(max(float(mean @ gram @ unit), -1.0), 1.0)
            angle = math.acos(cosine)
            if tol <= angle <= math.pi - tol:
                step += angle / math.sin(angle) * (unit - cosine * mean) / len(valid)
        size = _length(gram, step)
        if size < tol:
            break
        mean = math.cos(size) * mean + math.sin(size) / size * step
        mean = mean / _length(gram, mean)
    return tuple(float(c) for c in mean * lengths.mean())


def _length(gram: Array, coefficients: Array) -> float:
    """Length of a combination of the tensors."""
    return math.sqrt(max(float(coefficients @ gram @ coefficients), 0.0))
