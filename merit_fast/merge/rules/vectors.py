"""Coefficients of the methods that weigh every row or column of a tensor by itself.

Each reads the Gram matrices [V, K, K] of V vectors, and gives [V, inputs] coefficients, those of
the base last.
"""

from __future__ import annotations

import math

from merit_fast.kernels.lazy import np
from merit_fast.merge.rules.gram import Array
from merit_fast.merge.rules.values import Coefficients, TensorValues

_LEAST_LENGTH = 1e-7
_COLINEAR = 1e-16  # of 1 - cosine^2


def nuslerp(gram: Array, values: TensorValues) -> Coefficients:
    """``nuslerp_by_vector`` of one whole tensor."""
    return tuple(float(c) for c in nuslerp_by_vector(gram[None], values)[0])


def nuslerp_by_vector(grams: Array, values: TensorValues) -> Array:
    """``nuslerp_coefficients`` with the tensor's weights; of deltas, then the base's last."""
    first, second = values.weights()
    total = first + second
    t = 0.5 if abs(total) < 1e-6 else second / total
    coefficients = nuslerp_coefficients(grams, t)
    return _with_base(coefficients) if values.from_base else coefficients


def nuslerp_coefficients(grams: Array, t: float) -> Array:
    """[V, 2] the (a, b) of a x_1 + b x_2 from Gram matrices [V, 2, 2].

        omega = arccos(<x_1, x_2> / (max(|x_1|, 1e-7) max(|x_2|, 1e-7)))
        a = sin((1 - t) omega) / sin(omega); b = sin(t omega) / sin(omega)

    (1 - t, t) where the two are colinear. mergekit's NuSLERP, written from its formula.
    """
    lengths = [np.maximum(np.sqrt(grams[:, k, k]), _LEAST_LENGTH) for k in (0, 1)]
    cosines = np.clip(grams[:, 0, 1] / (lengths[0] * lengths[1]), -1.0, 1.0)
    colinear = ~(1.0 - cosines * cosines > _COLINEAR)
    omegas = [math.acos(c) for c in np.where(colinear, 0.0, cosines)]
    sines = np.array([math.sin(omega) for omega in omegas])
    a = np.array([math.sin((1.0 - t) * omega) for omega in omegas]) / sines
    b = np.array([math.sin(t * omega) for omega in omegas]) / sines
    return np.stack([np.where(colinear, 1.0 - t, a), np.where(colinear, t, b)], axis=1)


def model_stock_by_vector(grams: Array, values: TensorValues) -> Array:
    """[V, K + 1] K times c / K, then 1 - c for the base, from the deltas' Gram matrices [V, K, K].

    As ``model_stock_coefficients``, vector by vector; the base where the denominator vanishes.
    """
    count = grams.shape[1]
    lengths = np.sqrt(np.stack([grams[:, k, k] for k in range(count)], axis=1))
    total = np.zeros(len(grams))
    for a in range(count):
        for b in range(a + 1, count):
            scale = lengths[:, a] * lengths[:, b]
            cosines = grams[:, a, b] / np.where(scale > 0, scale, 1.0)
            total += np.where(scale > 0, cosines, 0.0)
    mean = total / (count * (count - 1) // 2)
    denominator = 1.0 + (count - 1) * mean
    is_sound = denominator > 1e-12
    share = np.where(is_sound, count * mean / np.where(is_sound, denominator, 1.0), 0.0)
    return _with_base(np.repeat((share / count)[:, None], count, axis=1))


def _with_base(coefficients: Array) -> Array:
    rest = 1.0 - coefficients.sum(axis=1, keepdims=True)
    return np.concatenate([coefficients, rest], axis=1)
