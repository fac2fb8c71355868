"""Student's t for estimates whose errors come from a few blocks. Pure NumPy, no SciPy."""

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_CONFIDENCE = NormalDist().inv_cdf(0.95)
_FALSE_SHARE = 0.01
_POWER = NormalDist().inv_cdf(0.8)
_FEWEST = 32  # examples


def one_sided_t(freedom: int) -> float:
    """The 95 % point of Student's t (Abramowitz & Stegun 26.7.5).

    Within 1 % from 3 degrees of freedom on.
    """
    z = _CONFIDENCE
    f = float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / f + second / f**2 + third / f**3


def upper_tail(t: Array, freedom: int) -> Array:
    """Chance that Student's t exceeds ``t`` (Abramowitz & Stegun 26.7.3 and 26.7.4)."""
    angle = np.arctan(np.asarray(t, np.float64) / math.sqrt(freedom))
    cosine = np.cos(angle)
    odd = freedom % 2
    term = np.where(odd, cosine, 1.0) if freedom > 1 else np.zeros_like(cosine)
    total = term.copy()
    for k in range(2 + odd, freedom - 1, 2):
        term = term * cosine**2 * (k - 1) / k
        total = total + term
    between = np.sin(angle) * total
    if odd:
        between = 2 / math.pi * (angle + between)
    return np.asarray((1 - between) / 2)


def surely_negative(values: Array, errors: Array, freedom: int) -> npt.NDArray[np.bool_]:
    """Values [P] that are below zero beyond doubt, with at most 1 % of false ones among them.

    Controls the false discovery rate (Benjamini & Hochberg 1995), so that many values do not yield
    some by chance.

    Args:
        values: [P] estimates.
        errors: [P] their standard errors.
        freedom: degrees of freedom of the errors.
    """
    scale = np.where(errors > 0, errors, 1.0)
    t = np.where(errors > 0, -values / scale, np.where(values < 0, np.inf, -np.inf))
    chance = upper_tail(t, freedom)
    ranked = np.sort(chance)
    below = np.flatnonzero(ranked <= _FALSE_SHARE * np.arange(1, len(ranked) + 1) / len(ranked))
    bound = ranked[below[-1]] if len(below) else -1.0
    return np.asarray(chance <= bound)


def more_examples(fraction: Array, error: Array, counts: Array) -> npt.NDArray[np.int64]:
    """[N] examples that would resolve each signal four times in five; 0: it is resolved.

    While noise prevails the fraction grows as n, its error hardly.

    Args:
        fraction: [N] U / R.
        error: [N] its standard error.
        counts: [N, G] examples per block.
    """
    number = counts.sum(1)
    blocks = (counts > 0).sum(1)
    bound = np.array([one_sided_t(int(count) - 1) if count > 1 else np.inf for count in blocks])
    larger = np.maximum(fraction, error)
    wanted = number * (bound + _POWER) * error / np.where(larger > 0, larger, np.nan)
    known = np.isfinite(wanted)
    more = np.where(
        known, np.ceil(np.where(known, wanted, 0.0) - number), np.maximum(_FEWEST - number, number)
    )
    resolved = fraction - np.where(error > 0, bound, 0.0) * error > 0
    return np.where(resolved, 0, np.maximum(more, 1)).astype(np.int64)
