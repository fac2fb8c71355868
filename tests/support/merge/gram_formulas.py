"""slerp, multislerp and model_stock by their formulas, on the vectors themselves."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def slerp_by_hand(t: float, first: Tensor, second: Tensor) -> Any:
    """The arc between unit vectors, applied to the vectors; a line where they nearly agree."""
    a: Floats = first.double().numpy()
    b: Floats = second.double().numpy()
    dot = np.sum(a / np.linalg.norm(a) * (b / np.linalg.norm(b)))
    if abs(dot) > 0.9995:
        return (1 - t) * a + t * b
    omega = np.arccos(dot)
    return np.sin((1 - t) * omega) / np.sin(omega) * a + np.sin(t * omega) / np.sin(omega) * b


def multislerp_by_hand(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    base: Tensor | None = None,
    eps: float = 1e-8,
) -> Any:
    """mergekit's formula, on the vectors themselves."""
    origin = base.double().numpy().ravel() if base is not None else 0.0
    x = [tensor.double().numpy().ravel() - origin for tensor in tensors]
    lengths = [np.linalg.norm(v) for v in x]
    units = [v / (n + eps) for v, n in zip(x, lengths, strict=True)]
    mean = sum(w * u for w, u in zip(weights, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(w * (u - (u @ mean) * mean) for w, u in zip(weights, units, strict=True))
    angle = np.linalg.norm(tangent) + eps
    direction = mean * np.cos(angle) + tangent * np.sin(angle) / angle
    out = direction * sum(w * n for w, n in zip(weights, lengths, strict=True)) + origin
    return out.reshape(tensors[0].shape)


def stock_by_hand(base: Tensor, tensors: Sequence[Tensor]) -> Any:
    origin: Floats = base.double().numpy()
    deltas: list[Floats] = [x.double().numpy() - origin for x in tensors]
    cosines = [
        np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cosine = np.mean(cosines)
    count = len(deltas)
    opposite = 1 + (count - 1) * cosine < 1e-12
    share = 0.0 if opposite else count * cosine / (1 + (count - 1) * cosine)
    return origin + share * np.mean(deltas, axis=0)
