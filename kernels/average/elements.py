"""Merge methods that decide element by element which models count: rule as data, and reference.

The native engine that merges files (csrc/elements/elements.cpp) gives the same bits without ever
holding a whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from merit_fast.kernels.average._eager import rounded, to_float64
from merit_fast.kernels.lazy import np
from merit_fast.records import record

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"

_MAGIC = 6755399441055744.0  # 1.5 * 2^52: adding it rounds to an integer
_LOG2_E = float.fromhex("0x1.71547652b82fep0")
_LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_LN2 = float.fromhex("0x1.62e42fefa39efp-1")
_ROOT_2 = float.fromhex("0x1.6a09e667f3bcdp0")
_EXP_TERMS = (
    tuple(1.0 / n for n in (6227020800.0, 479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0))
    + tuple(1.0 / n for n in (5040.0, 720.0, 120.0, 24.0, 6.0))
    + (0.5, 1.0, 1.0)
)
_LOG_TERMS = (
    tuple(1.0 / n for n in (23.0, 21.0, 19.0, 17.0, 15.0, 13.0))
    + tuple(1.0 / n for n in (11.0, 9.0, 7.0, 5.0, 3.0))
    + (1.0,)
)


@record
class ElementRule:
    """One tensor's result from models theta_k and the base theta_0, element by element.

        near:       d = theta_1 - theta_0
                    theta_0 + min(t / max(|d|, 1e-6), 1) d
        active:     delta_k = theta_k - theta_0; active_k = |delta_k| > epsilon
                    n = sum_k active_k
                    shared_k, unique_k = count(active_k & n > 1), count(active_k & n == 1)
                    factor_k = 1 + r clip(shared_k / max(unique_k, epsilon), 0, alpha)
                    theta_0 + sum_k (delta_k / n where n > 1, else factor_k delta_k)   # active ones
        important:  p, q = softmax(row of theta_1) + 1e-8, softmax(row of theta_0) + 1e-8
                    i = float32(|theta_1 - theta_0| max(sum p log(p / q), 0))
                    Q(s) = sort(i over the tensor)[int(s (n - 1))]
                    theta_1 where i >= Q(.5) + 1.5 (Q(.75) - Q(.25)), else theta_0

    All in float64, sums in the order of k, rounded once. ``row``: elements of a row. Sources:
    NearSwap (alchemonaut), Reinforced Agent Merging arXiv 2601.13572, Arcee Fusion (arcee.ai).
    """

    kind: Literal["near", "active", "important"]
    t: float = 0.0
    epsilon: float = 0.0
    r: float = 0.0
    alpha: float = 0.0
    row: int = 0


def mix_elements(
    inputs: Sequence[npt.NDArray[Any]],
    rule: ElementRule,
    *,
    dtypes: Sequence[str],
    out_dtype: str,
) -> tuple[npt.NDArray[Any], bool]:
    """Applies a rule to one whole tensor.

    Args:
        inputs: arrays [n] of the models, then the base; bf16 as its uint16 bits.
        rule: the method and its numbers for this tensor.
        dtypes, out_dtype: "BF16", "F16", "F32" or "F64".

    Returns:
        [n] of ``out_dtype`` (bf16 as uint16 bits), and whether every delta and result is finite.
    """
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        *models, base = (to_float64(x, dtype) for x, dtype in zip(inputs, dtypes, strict=True))
        deltas = [model - base for model in models]
        finite = all(bool(np.isfinite(delta).all()) for delta in deltas)
        total = _RULES[rule.kind](rule, models, base, deltas)
        out, is_finite = rounded(total, out_dtype)
    return out, finite and is_finite


def _near(
    rule: ElementRule, models: Sequence[Array], base: Array, deltas: Sequence[Array]
) -> Array:
    size = np.abs(deltas[0])
    ratio = rule.t / np.where(size > 1e-6, size, 1e-6)
    return np.asarray(base + np.where(ratio < 1.0, ratio, 1.0) * deltas[0])


def _active(
    rule: ElementRule, models: Sequence[Array], base: Array, deltas: Sequence[Array]
) -> Array:
    masks = [np.abs(delta) > rule.epsilon for delta in deltas]
    count = sum((mask.astype(np.int64) for mask in masks), np.zeros(base.size, np.int64))
    step = np.zeros(base.size)
    for delta, mask in zip(deltas, masks, strict=True):
        shared = int(np.count_nonzero(mask & (count > 1)))
        unique = int(np.count_nonzero(mask & (count == 1)))
        ratio = shared / max(float(unique), rule.epsilon) if rule.r else 0.0
        factor = 1.0 + rule.r * min(max(ratio, 0.0), rule.alpha)
        part = np.where(count > 1, delta / np.where(count > 1, count, 1), delta * factor)
        step += np.where(mask, part, 0.0)
    return base + step


def _important(
    rule: ElementRule, models: Sequence[Array], base: Array, deltas: Sequence[Array]
) -> Array:
    importance = np.empty(base.size, np.float32)
    for first in range(0, base.size, rule.row):
        here = slice(first, first + rule.row)
        divergence = _divergence(models[0][here], base[here])
        importance[here] = np.abs((deltas[0][here] * divergence).astype(np.float32))
    order = np.sort(importance)
    low, middle, high = (float(order[int(share * (base.size - 1))]) for share in (0.25, 0.5, 0.75))
    threshold = middle + 1.5 * (high - low)
    return np.where(importance.astype(np.float64) >= threshold, models[0], base)


_RULES = {"near": _near, "active": _active, "important": _important}


def _divergence(model: Array, base: Array) -> float:
    """Kullback-Leibler divergence of two rows' softmax, at least 0."""
    p = _exponentials(model)
    q = _exponentials(base)
    a = p / _sum_lanes(p) + 1e-8
    b = q / _sum_lanes(q) + 1e-8
    total = _sum_lanes(a * logarithm(a / b))
    return total if total > 0.0 else 0.0


def _exponentials(x: Array) -> Array:
    most = np.fmax.reduce(x, initial=-np.inf)
    return exponential(x - most)


def exponential(x: Array) -> Array:
    """e^x for x <= 0, in plain steps that every machine rounds alike; e^-700 below -700."""
    low = np.where(x > -700.0, x, -700.0)
    shifted = low * _LOG2_E + _MAGIC
    k = shifted - _MAGIC
    r = (low - k * _LN2_HIGH) - k * _LN2_LOW
    p = np.full(x.shape, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        p = p * r + term
    power = (shifted.view(np.uint64) << np.uint64(52)) + np.uint64(0x3FF0000000000000)
    return np.asarray(p * power.view(np.float64))


def logarithm(x: Array) -> Array:
    """The natural logarithm of positive numbers, in plain steps that every machine rounds alike."""
    bits = x.view(np.uint64)
    one = np.uint64(0x3FF0000000000000)
    fraction = ((bits & np.uint64(0xFFFFFFFFFFFFF)) | one).view(np.float64)
    large = fraction > _ROOT_2
    m = np.where(large, fraction * 0.5, fraction)
    e = ((bits >> np.uint64(52)).astype(np.int32) - 1023 + large).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = np.full(x.shape, _LOG_TERMS[0])
    for term in _LOG_TERMS[1:]:
        p = p * z + term
    return np.asarray(e * _LN2 + 2.0 * s * p)


def _sum_lanes(x: Array) -> float:
    """The sum in eight running sums, which are joined in a fixed tree."""
    lanes = np.add.accumulate(np.pad(x, (0, -x.size % 8)).reshape(-1, 8), axis=0)[-1]
    pairs = lanes[0::2] + lanes[1::2]
    return float((pairs[0] + pairs[1]) + (pairs[2] + pairs[3]))
