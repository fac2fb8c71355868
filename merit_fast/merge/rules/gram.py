"""Coefficients of the methods that weigh whole tensors by lengths and angles.

Each reads a tensor's Gram matrix, taken by an earlier pass, and gives the c_j of sum_j c_j theta_j.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from merit_fast.errors import InputError
from merit_fast.kernels.lazy import np
from merit_fast.merge.rules.values import Coefficients, TensorValues

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"

_COLINEAR = 0.9995  # above this cosine slerp is a lerp, as in mergekit
_NO_LENGTH = 1e-8


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
    coefficients = multislerp_coefficients(gram, values.weights(), values.name)
    return (*coefficients, 1.0 - sum(coefficients)) if values.from_base else coefficients


def model_stock(gram: Array, values: TensorValues) -> Coefficients:
    """``model_stock_coefficients``; the method has no parameters."""
    return model_stock_coefficients(gram)


def multislerp_coefficients(gram: Array, weights: Coefficients, name: str) -> Coefficients:
    """[K] coefficients of a step along the sphere from the mean direction; ``gram`` is [K, K].

        u_k = x_k / |x_k|; m = normalised sum_k w_k u_k; T = sum_k w_k (u_k - <u_k, m> m); a = |T|
        out = (cos(a) m + sin(a) T / a) * sum_k w_k |x_k|

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
    unit = 1.0 / (lengths + _NO_LENGTH)  # u_k = unit_k x_k
    mean = w * unit
    length = math.sqrt(max(float(mean @ gram @ mean), 0.0))
    if length < _NO_LENGTH:
        if len(gram) == 2 or not lengths.any():
            return weights
        raise InputError(
            f"merge: {name}: multislerp needs directions that do not cancel, "
            "their mean has length 0"
        )
    mean = mean / length
    along = (unit * (gram @ mean)) @ w  # sum_k w_k <u_k, m>
    tangent = w * unit - along * mean
    angle = math.sqrt(max(float(tangent @ gram @ tangent), 0.0)) + _NO_LENGTH
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
