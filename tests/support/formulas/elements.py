"""Methods that decide by element, row or column, by their formulas in fp64 on whole tensors."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support.merge.formulas import elect, f64
from torch import Tensor

Floats = NDArray[np.float64]


def nearswap_by_hand(base: Tensor, model: Tensor, t: float) -> Floats:
    d = f64(model) - f64(base)
    share = np.clip(t / np.maximum(np.abs(d), 1e-6), 0, 1)
    return np.asarray(f64(base) + share * d)


def ram_by_hand(
    base: Tensor, models: Sequence[Tensor], epsilon: float, r: float = 0.0, alpha: float = 0.0
) -> Floats:
    deltas = np.stack([f64(model) - f64(base) for model in models])
    active = np.abs(deltas) > epsilon
    count = active.sum(axis=0)
    step = np.zeros(deltas.shape[1])
    for k, delta in enumerate(deltas):
        shared = int(np.sum(active[k] & (count > 1)))
        unique = int(np.sum(active[k] & (count == 1)))
        factor = 1 + r * np.clip(shared / max(unique, epsilon), 0, alpha) if r else 1.0
        alone = active[k] & (count == 1)
        several = active[k] & (count > 1)
        step[alone] += delta[alone] * factor
        step[several] += delta[several] / count[several]
    return f64(base) + step


def fusion_by_hand(base: Tensor, model: Tensor) -> Floats:
    """The importance in fp64; quantiles are elements of the sorted list."""
    row = base.shape[-1] if base.ndim else 1
    x = f64(model).reshape(-1, row)
    z = f64(base).reshape(-1, row)
    p = _softmax(x) + 1e-8
    q = _softmax(z) + 1e-8
    divergence = np.maximum((p * np.log(p / q)).sum(axis=-1, keepdims=True), 0)
    importance = (np.abs(x - z) * divergence).ravel().astype(np.float32).astype(np.float64)
    order = np.sort(importance)
    low, middle, high = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= middle + 1.5 * (high - low), x.ravel(), z.ravel())


def _softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def vectors_of(x: Floats, shape: Sequence[int], vectors: str) -> Floats:
    """[V, length] the rows, or the columns, of a flat tensor; the whole of it."""
    if vectors == "tensor":
        return x.reshape(1, -1)
    if vectors == "row" or len(shape) < 2:
        return x.reshape(-1, shape[-1] if shape else 1)
    return x.reshape(shape[0], -1).T


def from_vectors(x: Floats, shape: Sequence[int], vectors: str) -> Floats:
    is_column = vectors == "column" and len(shape) > 1
    return (x.T if is_column else x).reshape(-1)


def nuslerp_by_hand(
    models: Sequence[Tensor], weights: Sequence[float], vectors: str, base: Tensor | None = None
) -> Floats:
    shape = models[0].shape
    origin = f64(base) if base is not None else np.zeros(models[0].numel())
    a, b = (vectors_of(f64(model) - origin, shape, vectors) for model in models)
    t = weights[1] / sum(weights)
    lengths = [np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-7) for v in (a, b)]
    cosine = np.clip(np.sum(a / lengths[0] * (b / lengths[1]), axis=1, keepdims=True), -1, 1)
    line = 1 - cosine**2 <= 1e-16
    omega = np.arccos(np.where(line, 0, cosine))
    arc = (np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega)
    out = np.where(line, (1 - t) * a + t * b, arc)
    return np.asarray(from_vectors(out, shape, vectors) + origin)


def stock_by_vector(base: Tensor, models: Sequence[Tensor], vectors: str) -> Floats:
    shape = base.shape
    count = len(models)
    origin = vectors_of(f64(base), shape, vectors)
    deltas = [vectors_of(f64(model), shape, vectors) - origin for model in models]
    out = np.empty_like(origin)
    for v in range(len(origin)):
        cosines = []
        for i in range(count):
            for j in range(i + 1, count):
                scale = np.linalg.norm(deltas[i][v]) * np.linalg.norm(deltas[j][v])
                cosines.append(deltas[i][v] @ deltas[j][v] / scale if scale > 0 else 0.0)
        denominator = 1 + (count - 1) * np.mean(cosines)
        share = count * np.mean(cosines) / denominator if denominator > 1e-12 else 0.0
        out[v] = origin[v] + share * np.mean([delta[v] for delta in deltas], axis=0)
    return from_vectors(out, shape, vectors)


def karcher_by_hand(models: Sequence[Tensor], max_iter: int = 10, tol: float = 1e-5) -> Any:
    x = [f64(model) for model in models]
    lengths = [np.linalg.norm(v) for v in x]
    units = [v / n for v, n in zip(x, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros(x[0].size)
    mean = np.mean(units, axis=0)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros(mean.size)
        for unit in units:
            angle = np.arccos(np.clip(mean @ unit, -1, 1))
            if tol <= angle <= np.pi - tol:
                step += angle / np.sin(angle) * (unit - np.cos(angle) * mean) / len(units)
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / np.linalg.norm(mean)
    return mean * np.mean(lengths)


def rescaled_ties(
    models: Sequence[Tensor], base: Tensor, weights: Sequence[float], density: float
) -> Floats:
    """ties with each thinned delta enlarged to the sum of sizes of the whole delta."""
    kept = []
    for model in models:
        delta = f64(model) - f64(base)
        mask = np.zeros(delta.size, bool)
        count = max(1, int(density * delta.size))
        sizes = (model.float() - base.float()).abs().numpy().ravel()
        mask[np.argsort(-sizes, kind="stable")[:count]] = True
        thinned = np.where(mask, delta, 0.0)
        before, after = np.abs(delta).sum(), np.abs(thinned).sum()
        factor = 1.0 if before < 1e-7 or after < 1e-7 else before / after
        kept.append(thinned * factor)
    weighted = [w * d for w, d in zip(weights, kept, strict=True)]
    return np.asarray(f64(base) + elect(weighted, weights, True))
