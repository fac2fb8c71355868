"""The merge methods' formulas in plain fp64 NumPy, one tensor at a time."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from support.merge.merges import bits
from torch import Tensor

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
PerModel = float | Sequence[float]

U64 = (1 << 64) - 1


def f64(tensor: Tensor) -> Floats:
    return np.asarray(tensor.double().numpy().ravel())


def uniform(seed: int, name: str, branch: int, count: int) -> Floats:
    """[count] random numbers of a tensor and a branch, by Python's integers."""
    key = int.from_bytes(
        hashlib.sha256(f"{seed}\0{name}\0{branch}".encode()).digest()[:8], "little"
    )
    return np.array([(splitmix(key, i) >> 11) / 2**53 for i in range(count)])


def splitmix(key: int, i: int) -> int:
    z = (key + (i + 1) * 0x9E3779B97F4A7C15) & U64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & U64
    return z ^ z >> 31


def size(x: Tensor, base: Tensor) -> NDArray[np.float32]:
    """Sizes that rank elements: |x - base| in fp32."""
    if torch.float64 in (x.dtype, base.dtype):
        with np.errstate(over="ignore"):
            return np.abs(f64(x) - f64(base)).astype(np.float32)
    return np.asarray((x.float() - base.float()).abs().numpy().ravel())


def largest(sizes: NDArray[np.float32], first: int, count: int) -> Mask:
    """Mask of elements first .. first + count by falling size; smaller index first if equal."""
    mask = np.zeros(sizes.size, bool)
    mask[np.argsort(-sizes, kind="stable")[first : first + count]] = True
    return mask


def elect(
    weighted: Sequence[Floats],
    weights: Sequence[float],
    normalize: bool,
    votes: Sequence[Floats] | None = None,
) -> Floats:
    """Sum over those of the sign of the sum of all votes (0: plus), divided by their weights."""
    total = np.zeros(weighted[0].size)
    for d in votes or weighted:
        total = total + d
    mixed = np.zeros(total.size)
    divisor = np.zeros(total.size)
    for d, w in zip(weighted, weights, strict=True):
        agree = np.sign(d) == np.where(total >= 0, 1.0, -1.0)
        mixed[agree] += d[agree]
        divisor[agree] += w
    return np.divide(mixed, divisor, out=mixed.copy(), where=divisor != 0) if normalize else mixed


def each(value: PerModel, count: int) -> Sequence[float]:
    return value if isinstance(value, Sequence) else [value] * count


def thinned(
    method: str,
    name: str,
    models: Sequence[Tensor],
    base: Tensor,
    density: PerModel,
    gamma: PerModel,
    epsilon: PerModel,
    seed: int,
) -> list[Floats]:
    """Every branch's delta without dropped elements, the rest enlarged if the method does that."""
    deltas = [f64(x) - f64(base) for x in models]
    count = len(models)
    n = base.numel()
    kept = []
    for k, (delta, p) in enumerate(zip(deltas, each(density, count), strict=True)):
        sizes = size(models[k], base)
        chance: float | Floats = p
        if method == "ties":
            mask = largest(sizes, 0, max(1, int(p * n)) if p > 0 else 0)
        elif method.startswith("breadcrumbs") and p < 1:
            top = int(each(gamma, count)[k] * n)
            stay = int(p * n)
            smallest = max(0, n - stay - top)
            mask = largest(sizes, n - smallest - stay, stay)
        elif method.startswith("della") and 0 < p < 1:
            row = base.shape[-1] if base.ndim else 1
            spread = each(epsilon, count)[k]
            rows = [np.argsort(np.lexsort((np.arange(row), r))) for r in sizes.reshape(-1, row)]
            places = np.concatenate([np.empty(0), *rows])
            varied = (p - spread) + 2.0 * spread * (places / max(1, row - 1))
            chance = varied if row > 1 else np.full(n, p)
            mask = uniform(seed, name, k, n) < chance
        elif method.startswith(("dare", "della")):
            mask = uniform(seed, name, k, n) < p
        else:
            mask = np.ones(n, bool)
        if method.startswith(("dare", "della")) and np.all(np.asarray(chance) > 0):
            delta = delta / chance
        kept.append(np.where(mask, delta, 0.0))
    return kept


def sce(models: Sequence[Tensor], base: Tensor, share: float) -> Floats:
    deltas = [f64(x) - f64(base) for x in models]
    count = len(deltas)
    mean = sum(deltas[1:], deltas[0]) / count
    variance = (sum(((d - mean) ** 2 for d in deltas), np.zeros(mean.size)) / count).astype(
        np.float32
    )
    if share < 1:
        mask = largest(variance, 0, int((variance != 0).sum() * share))
        deltas = [np.where(mask, d, 0.0) for d in deltas]
    squares = [float(np.sum(d * d)) for d in deltas]
    weights = [s / sum(squares) if sum(squares) else 1 / count for s in squares]
    return elect([w * d for w, d in zip(weights, deltas, strict=True)], weights, True, votes=deltas)


def delta_method(  # noqa: PLR0913
    method: str,
    name: str,
    models: Sequence[Tensor],
    base: Tensor,
    weights: Sequence[float],
    *,
    scale: float = 1.0,
    density: PerModel = 1.0,
    gamma: PerModel = 0.01,
    epsilon: PerModel = 0.15,
    select_topk: float = 1.0,
    normalize: bool = True,
    seed: int = 0,
) -> Floats:
    """[n] fp64. models: K tensors, base: one tensor, all of one shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        if method == "sce":
            return f64(base) + scale * sce(models, base, select_topk)
        kept = thinned(method, name, models, base, density, gamma, epsilon, seed)
        weighted = [w * d for w, d in zip(weights, kept, strict=True)]
        if method in ("ties", "dare_ties", "breadcrumbs_ties", "della"):
            step = elect(weighted, weights, normalize)
        else:
            step = sum(weighted, np.zeros(base.numel()))
        return f64(base) + scale * step


def rounded(values: Floats, dtype: torch.dtype) -> NDArray[Any]:
    """fp64 rounded once to nearest even, as bits; bf16 by integers, not through fp32."""
    with np.errstate(over="ignore"):
        if dtype != torch.bfloat16:
            return bits(torch.from_numpy(values.astype(torch.empty(0, dtype=dtype).numpy().dtype)))
    wide = values.view(np.uint64)
    magnitude = np.abs(values)
    tiny = magnitude < 2.0**-126  # steps of 2^-133 below: scaled, every one is an integer
    low = np.rint(np.where(tiny, magnitude, 0.0) * 2.0**133).astype(np.uint16)
    half = (wide >> np.uint64(45)) & np.uint64(1)
    wide = wide + np.uint64((1 << 44) - 1) + half  # 7 bits of the fraction stay
    exponent = ((wide >> np.uint64(52)) & np.uint64(0x7FF)).astype(np.int64) - 1023 + 127
    high = (np.clip(exponent, 0, 255) << 7) | ((wide >> np.uint64(45)) & np.uint64(0x7F)).astype(
        np.int64
    )
    high = np.where(exponent >= 255, 0x7F80, high)
    out = np.where(tiny, low, high).astype(np.uint16) | (np.signbit(values).astype(np.uint16) << 15)
    return np.where(np.isnan(values), 0x7FC0, out).astype(np.uint16)
