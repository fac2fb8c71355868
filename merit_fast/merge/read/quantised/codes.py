"""The value of every code of a number with at most 8 bits. Imports no NumPy.

OCP 8-bit Floating Point Specification; OCP Microscaling Formats (E2M1, E2M3, E3M2, E8M0);
the FNUZ floats have one zero and one NaN, and an exponent bias that is larger by one.
"""

import math
from collections.abc import Callable
from functools import cached_property

from merit_fast.records import record


@record
class Code:
    """A kind of number. ``value`` maps a code below 2^bits to its value."""

    name: str
    bits: int
    value: Callable[[int], float]

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Every code's value."""
        return tuple(self.value(code) for code in range(1 << self.bits))


def _minifloat(
    exponent_bits: int, mantissa_bits: int, bias: int, special: Callable[[int], float | None]
) -> Callable[[int], float]:
    """Value of a sign, an exponent and a mantissa; ``special`` names codes without a sign."""
    sign_bit = 1 << (exponent_bits + mantissa_bits)
    steps = 1 << mantissa_bits

    def value(code: int) -> float:
        magnitude = code & (sign_bit - 1)
        known = special(code)
        if known is not None:
            return known
        known = special(magnitude)
        exponent = magnitude >> mantissa_bits
        fraction = magnitude & (steps - 1)
        if known is not None:
            size = known
        elif exponent:
            size = math.ldexp(steps + fraction, exponent - bias - mantissa_bits)
        else:
            size = math.ldexp(fraction, 1 - bias - mantissa_bits)
        return -size if code & sign_bit else size

    return value


def _none(code: int) -> float | None:
    return None


def _e4m3_special(code: int) -> float | None:
    return math.nan if code == 0x7F else None


def _e5m2_special(code: int) -> float | None:
    if code == 0x7C:
        return math.inf
    return math.nan if 0x7C < code < 0x80 else None


def _fnuz_special(code: int) -> float | None:
    return math.nan if code == 0x80 else None


def _power_of_two(code: int) -> float:
    return math.nan if code == 255 else math.ldexp(1.0, code - 127)


def _offset(bits: int) -> Callable[[int], float]:
    return lambda code: float(code - (1 << (bits - 1)))


def _complement(code: int) -> float:
    return float(code - 256 if code > 127 else code)


def _plain(code: int) -> float:
    return float(code)


CODES = {
    code.name: code
    for code in (
        Code("F8_E4M3", 8, _minifloat(4, 3, 7, _e4m3_special)),
        Code("F8_E5M2", 8, _minifloat(5, 2, 15, _e5m2_special)),
        Code("F8_E4M3FNUZ", 8, _minifloat(4, 3, 8, _fnuz_special)),
        Code("F8_E5M2FNUZ", 8, _minifloat(5, 2, 16, _fnuz_special)),
        Code("F8_E8M0", 8, _power_of_two),
        Code("F4", 4, _minifloat(2, 1, 1, _none)),
        Code("F6_E2M3", 6, _minifloat(2, 3, 1, _none)),
        Code("F6_E3M2", 6, _minifloat(3, 2, 3, _none)),
        *(Code(f"INT{bits}", bits, _offset(bits)) for bits in range(1, 9)),
        Code("I8", 8, _complement),
        Code("U8", 8, _plain),
    )
}
# Codes that safetensors names as dtypes: a tensor of them means nothing without its scales.
FLOAT_CODES = (
    "F8_E4M3",
    "F8_E5M2",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F8_E8M0",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
)


def stem_of(name: str) -> str:
    """A tensor's name without ".weight"; the names of its parts begin with it."""
    return name.removesuffix(".weight")
