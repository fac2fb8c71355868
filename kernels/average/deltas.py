"""Merge methods that sparsify each branch's delta before they sum: rule as data, and reference.

The native engine that merges files (csrc/engine/deltas.cpp) gives the same bits without ever
holding a whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from merit_fast.kernels import _splitmix
from merit_fast.kernels.average._eager import rounded, to_float64
from merit_fast.kernels.lazy import np
from merit_fast.records import record

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
Mask: TypeAlias = "npt.NDArray[np.bool_]"


@record
class DeltaRule:
    """One tensor's step from its deltas delta_k = theta_k - theta_0. An empty field skips its line.

        size = abs(float32(theta_k) - float32(theta_0))     # of float64 inputs float32(delta_k)
        order = argsort(-size, stable)                      # NaN above infinity; ties by index
        delta_k[not in order[top[k] : top[k] + keep[k]]] = 0
        v = var(deltas, axis=0) as float32                  # variance_share
        delta[not in the int(variance_share * count(v > 0)) largest v] = 0
        p = density[k]
        p = density[k] - epsilon + 2 epsilon rank / (row - 1)   # row; rank of size within its row
        delta_k = where(uniform(stream[k], element) < p, delta_k / (p if divide else 1), 0)
        all, kept = sum|delta_k| before and after           # restore_sizes, with top and keep
        delta_k *= 1 if all < 1e-7 or kept < 1e-7 else all / kept
        weight_k = sum(delta_k^2) / sum over branches       # weigh_by_squares
        d_k = weight[k] * delta_k
        up = sum_k d_k >= 0                                 # elect (weigh_by_squares: delta_k)
        d_k = where(up, d_k > 0, d_k < 0) ? d_k : 0
        step = sum_k d_k
        step /= sum of the weights that agree               # normalize
        out = theta_0 + scale * step

    All in float64, sums in the order of k, rounded once. Papers: TIES arXiv 2306.01708, DARE
    2311.03099, Model Breadcrumbs 2312.06795, DELLA 2406.11617, SCE (FuseChat) 2408.07990.
    """

    weight: tuple[float, ...]
    top: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    variance_share: float = 1.0  # below 1: one mask for all branches
    stream: tuple[int, ...] = ()  # keys of SplitMix64, one per branch
    density: tuple[float, ...] = ()
    epsilon: tuple[float, ...] = ()
    divide: bool = True
    restore_sizes: bool = False
    row: int = 0  # elements of a row; 0: probabilities do not depend on ranks
    elect: bool = False
    normalize: bool = False  # divide by the agreeing weights; only with elect
    weigh_by_squares: bool = False
    scale: float = 1.0


SQUARES_CHUNK = 1 << 17  # elements; squares are summed chunk by chunk, so one size gives one result


def mix_deltas(
    inputs: Sequence[npt.NDArray[Any]],
    base: npt.NDArray[Any],
    rule: DeltaRule,
    *,
    dtypes: Sequence[str],
    base_dtype: str,
    out_dtype: str,
) -> tuple[npt.NDArray[Any], bool]:
    """Apply a rule to one whole tensor.

    Args:
        inputs: K arrays [n] of the branches; bf16 as its uint16 bits.
        base: [n].
        rule: the method and its numbers for this tensor.
        dtypes, base_dtype, out_dtype: "BF16", "F16", "F32" or "F64".

    Returns:
        [n] of ``out_dtype`` (bf16 as uint16 bits), and whether every delta and result is finite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        start = to_float64(base, base_dtype)
        deltas = [to_float64(x, dtype) - start for x, dtype in zip(inputs, dtypes, strict=True)]
        finite = all(bool(np.isfinite(delta).all()) for delta in deltas)
        sizes = [
            _size(x, base, delta, d, base_dtype)
            for x, delta, d in zip(inputs, deltas, dtypes, strict=True)
        ]
        kept = [
            np.where(mask, d, 0.0)
            for mask, d in zip(_kept(rule, deltas, sizes), deltas, strict=True)
        ]
        if rule.stream:
            kept = [_by_chance(rule, k, delta, sizes[k]) for k, delta in enumerate(kept)]
        if rule.restore_sizes and rule.top:
            factors = [_restored(delta, part) for delta, part in zip(deltas, kept, strict=True)]
            kept = [part * factor for part, factor in zip(kept, factors, strict=True)]
        weight = _weights_by_squares(kept) if rule.weigh_by_squares else rule.weight
        weighted = [d * w for d, w in zip(kept, weight, strict=True)]
        votes = kept if rule.weigh_by_squares else weighted
        step = (
            _elect(votes, weighted, weight, rule.normalize)
            if rule.elect
            else sum(weighted, np.zeros(start.size))
        )
        total = start + rule.scale * step
        out, is_finite = rounded(total, out_dtype)
    return out, finite and is_finite


def uniform(stream: int, first: int, count: int) -> Array:
    """[count] numbers in [0, 1): those of a stream from its element ``first`` on."""
    counters = np.arange(first, first + count, dtype=np.int64)
    bits = _splitmix.draw(_splitmix.signed(stream), counters) >> 11 & (1 << 53) - 1
    return np.asarray(bits.astype(np.float64) * 2.0**-53)


def _size(x: Any, base: Any, delta: Array, dtype: str, base_dtype: str) -> npt.NDArray[np.float32]:
    if "F64" in (dtype, base_dtype):
        return np.abs(delta.astype(np.float32))
    narrow = [
        to_float64(array, d).astype(np.float32) for array, d in ((x, dtype), (base, base_dtype))
    ]
    return np.asarray(np.abs(narrow[0] - narrow[1]))


def _largest(sizes: npt.NDArray[np.float32], count: int) -> Mask:
    mask = np.zeros(sizes.size, bool)
    # Bits of positive floats are ordered as their values are, with NaN above infinity.
    order = np.argsort(-sizes.view(np.int32), kind="stable")
    mask[order[: max(count, 0)]] = True
    return mask


def _kept(
    rule: DeltaRule, deltas: Sequence[Array], sizes: Sequence[npt.NDArray[np.float32]]
) -> list[Mask]:
    if rule.variance_share < 1.0:
        count = len(deltas)
        mean = sum(deltas, np.zeros(deltas[0].size)) / count
        variance = np.abs(
            (sum(((d - mean) ** 2 for d in deltas), np.zeros(mean.size)) / count).astype(np.float32)
        )
        return [_largest(variance, int(np.count_nonzero(variance) * rule.variance_share))] * count
    if not rule.top:
        return [np.ones(delta.size, bool) for delta in deltas]
    return [
        _largest(size, top + keep) & ~_largest(size, top)
        for size, top, keep in zip(sizes, rule.top, rule.keep, strict=True)
    ]


def _by_chance(rule: DeltaRule, k: int, delta: Array, size: npt.NDArray[np.float32]) -> Array:
    density: Any = rule.density[k]
    if rule.row > 1:
        order = np.argsort(size.view(np.int32).reshape(-1, rule.row), axis=1, kind="stable")
        ranks = np.argsort(order, axis=1, kind="stable").reshape(-1)
        density = (density - rule.epsilon[k]) + 2.0 * rule.epsilon[k] * (ranks / (rule.row - 1))
    enlarged = delta / density if rule.divide else delta
    return np.where(uniform(rule.stream[k], 0, delta.size) < density, enlarged, 0.0)


def _restored(delta: Array, kept: Array) -> float:
    """The factor that gives the kept deltas the size sum of all."""
    whole = _chunked_sum(np.abs(delta))
    part = _chunked_sum(np.abs(kept))
    return 1.0 if whole < 1e-7 or part < 1e-7 else whole / part


def _chunked_sum(values: Array) -> float:
    """The sum of [n] numbers chunk by chunk, each in eight lanes."""
    total = 0.0
    for first in range(0, values.size, SQUARES_CHUNK):
        chunk = values[first : first + SQUARES_CHUNK]
        lanes = np.add.accumulate(np.pad(chunk, (0, -chunk.size % 8)).reshape(-1, 8), axis=0)[-1]
        pairs = lanes[0::2] + lanes[1::2]
        total += (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])
    return float(total)


def _weights_by_squares(kept: Sequence[Array]) -> tuple[float, ...]:
    sums = [_chunked_sum(delta * delta) for delta in kept]
    whole = 0.0
    for each in sums:
        whole += each
    return tuple(each / whole if whole > 0.0 else 1.0 / len(sums) for each in sums)


def _elect(
    votes: Sequence[Array], weighted: Sequence[Array], weight: Sequence[float], normalize: bool
) -> Array:
    total = sum(votes, np.zeros(weighted[0].size))
    mixed = np.zeros(total.size)
    divisor = np.zeros(total.size)
    for d, w in zip(weighted, weight, strict=True):
        agrees = np.where(total >= 0.0, d > 0.0, d < 0.0)
        mixed += np.where(agrees, d, 0.0)
        divisor += np.where(agrees, w, 0.0)
    return (
        np.where(divisor != 0.0, mixed / np.where(divisor != 0.0, divisor, 1.0), mixed)
        if normalize
        else mixed
    )
