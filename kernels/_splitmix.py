"""SplitMix64 (Steele, Lea & Flood 2014), the one counter-based random generator of all kernels.

Written once for NumPy and torch: both wrap products of int64 arrays and shift them arithmetically.
csrc has the same function in C++, kernels/sketch/_triton_tiles.py in Triton.
"""

from typing import Any

_MASK = (1 << 64) - 1


def draw(key: Any, counters: Any) -> Any:
    """Returns the 64 random bits at each position ``counters`` of the stream ``key``.

    Args:
        key: an int below 2^63 in size, or an int64 array.
        counters: int64 array of NumPy or torch, at least one-dimensional.

    Returns:
        int64 array; all 64 bits are random.
    """
    z = key + (counters + 1) * signed(0x9E3779B97F4A7C15)
    z = (z ^ _shifted_right(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * signed(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def signed(value: int) -> int:
    """The low 64 bits of ``value`` as a signed number, which is how arrays hold them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shifted_right(z: Any, count: int) -> Any:
    """Shifts in zeros, also where the sign bit is set."""
    return z >> count & (1 << 64 - count) - 1
