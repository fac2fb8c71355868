"""SplitMix64 (Steele, Lea & Flood 2014), the one counter-based random generator of all kernels.

Written once for NumPy, torch and Python's ints: products of int64 arrays wrap by themselves, ints
are wrapped here. csrc has the function in C++, kernels/sketch/_triton_tiles.py in Triton.
"""

from typing import Any

_MASK = (1 << 64) - 1


def signed(value: int) -> int:
    """The low 64 bits of ``value`` as a signed number, which is how arrays hold them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = signed(0x9E3779B97F4A7C15)
_FIRST = signed(0xBF58476D1CE4E5B9)
_SECOND = signed(0x94D049BB133111EB)


def draw(key: Any, counters: Any) -> Any:
    """Returns the 64 random bits at each position ``counters`` of the stream ``key``.

    Args:
        key: an int, for arrays below 2^63 in size; or an int64 array of a stream per position.
        counters: an int, or an int64 array of NumPy or torch, at least one-dimensional.

    Returns:
        A signed int, or an int64 array; all 64 bits are random.
    """
    z = _wrapped(key + (counters + 1) * _GOLDEN)
    z = _wrapped((z ^ _shifted_right(z, 30)) * _FIRST)
    z = _wrapped((z ^ _shifted_right(z, 27)) * _SECOND)
    return z ^ _shifted_right(z, 31)


def _wrapped(z: Any) -> Any:
    return signed(z) if isinstance(z, int) else z


def _shifted_right(z: Any, count: int) -> Any:
    """Shifts in zeros, also where the sign bit is set."""
    return z >> count & (1 << 64 - count) - 1
