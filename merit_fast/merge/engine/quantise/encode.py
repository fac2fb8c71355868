"""Values as 8-bit floats with fresh scales. Without ``is_native`` it is the reference in NumPy."""

import numpy as np
import numpy.typing as npt

from merit_fast.kernels import dispatch
from merit_fast.merge.engine.decode import code_values
from merit_fast.merge.engine.quantise.encoding import Encoding
from merit_fast.merge.engine.quantise.rounding import Rounding

Array = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]
_SIGN = 128
# Bits of the mantissa, bias, code of the largest value, code of infinity (NaN where there is none).
_KINDS = {"F8_E4M3": (3, 7, 0x7E, 0x7F), "F8_E5M2": (2, 15, 0x7B, 0x7C)}


def block_sizes(values: Array, encoding: Encoding) -> Array:
    """[row blocks, column blocks] largest finite absolute value of each block.

    Args:
        values: [n, columns] rows of one matrix, from a block's first row on.
    """
    rows, columns = values.shape
    sizes = np.where(np.isfinite(values), np.abs(values), 0.0)
    block = (encoding.block_rows, encoding.block_columns)
    edges = [-rows % block[0] if rows > block[0] else 0, -columns % block[1]]
    height = min(rows, block[0])
    padded = np.pad(sizes, ((0, edges[0]), (0, edges[1])))
    shape = (padded.shape[0] // height, height, padded.shape[1] // block[1], block[1])
    return np.asarray(padded.reshape(shape).max(axis=(1, 3)))


def raise_sizes(values: Array, encoding: Encoding, sizes: Array, is_native: bool) -> None:
    """Raises ``sizes`` [row blocks, column blocks] to ``block_sizes`` of some rows."""
    if is_native:
        block = {"block_rows": encoding.block_rows, "block_cols": encoding.block_columns}
        dispatch.native().block_sizes(values=values, first_row=0, sizes=sizes, **block)
    else:
        np.maximum(sizes, block_sizes(values, encoding), out=sizes)


def round_scales(sizes: Array, encoding: Encoding) -> tuple[Array, Codes]:
    """Scales of blocks and their stored bytes: sizes / largest code, rounded to the scale's dtype.

    float32 rounds to nearest; bf16 and fp16 round up and E8M0 up to a power of two, so that no
    value is beyond the largest code. A block of zeros has the scale 1.
    """
    exact = np.where(sizes > 0, sizes / encoding.largest, 1.0)
    dtype = encoding.scale_dtype
    if dtype in ("F8_E8M0", "U8"):
        mantissa, exponent = np.frexp(exact)
        byte = np.clip(np.where(mantissa == 0.5, exponent - 1, exponent) + 127, 0, 254)
        return np.ldexp(1.0, byte - 127), byte.astype(np.uint8)
    if dtype == "F32":
        least = np.finfo(np.float32).smallest_subnormal
        scales = np.maximum(exact.astype(np.float32), least)
        return scales.astype(np.float64), scales.view(np.uint8)
    if dtype == "F16":
        half = exact.astype(np.float16)
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
        return half.astype(np.float64), np.ascontiguousarray(half).view(np.uint8)
    bits = np.maximum(exact.astype(np.float32), np.finfo(np.float32).smallest_subnormal)
    down = bits.view(np.uint32) & np.uint32(0xFFFF0000)
    up = np.where(down.view(np.float32) < exact, down + np.uint32(0x10000), down)
    words = (up >> np.uint32(16)).astype(np.uint16)
    return up.view(np.float32).astype(np.float64), words.view(np.uint8)


def encode_rows(
    values: Array,
    scales: Array,
    encoding: Encoding,
    first_row: int = 0,
    is_native: bool = False,
) -> tuple[Codes, Rounding]:
    """Codes of rows of one matrix: value / scale to the nearest code, ties to the even one.

    Args:
        values: [n, columns].
        scales: [row blocks, column blocks] of the matrix.
        first_row: number of the first row in the matrix.
        is_native: whether merit_fast._C does it.

    Returns:
        ([n, columns] codes, errors). Values beyond the largest code become that code, NaN and,
        where the kind has none, infinities become NaN.
    """
    if is_native:
        return _encode_natively(values, scales, encoding, first_row)
    rows = (first_row + np.arange(values.shape[0])) // encoding.block_rows
    columns = np.arange(values.shape[1]) // encoding.block_columns
    spread = scales[rows[:, None], columns[None, :]]
    table = code_values(encoding.code)
    steps = table[:_SIGN][np.isfinite(table[:_SIGN])]
    middles = (steps[1:] + steps[:-1]) / 2
    with np.errstate(invalid="ignore", over="ignore"):
        sizes = np.abs(values / spread)
        low = np.searchsorted(middles, sizes, "left")
        tie = (low < len(middles)) & (middles[np.minimum(low, len(middles) - 1)] == sizes)
        codes = low + (tie & (low % 2 == 1))
        codes = np.where(np.isfinite(values), codes, _nonfinite(values, table))
        codes = np.where(np.signbit(values), codes | _SIGN, codes).astype(np.uint8)
        errors = np.where(np.isfinite(values), values - table[codes] * spread, 0.0)
        finite = np.where(np.isfinite(values), values, 0.0)
    largest = float(np.abs(errors).max(initial=0.0))
    squares = float(np.square(errors).sum())
    return codes, Rounding(values.size, largest, squares, float(np.square(finite).sum()))


def _encode_natively(
    values: Array, scales: Array, encoding: Encoding, first_row: int
) -> tuple[Codes, Rounding]:
    codes = np.empty(values.shape, np.uint8)
    mantissa_bits, bias, largest, infinity = _KINDS[encoding.code]
    errors = dispatch.native().encode_rows(
        values=values,
        first_row=first_row,
        block_rows=encoding.block_rows,
        block_cols=encoding.block_columns,
        mantissa_bits=mantissa_bits,
        bias=bias,
        largest=largest,
        infinity=infinity,
        scales=scales,
        codes=codes,
    )
    return codes, Rounding(values.size, *errors)


def _nonfinite(values: Array, table: Array) -> npt.NDArray[np.int64]:
    """Codes without a sign for NaN and infinities."""
    nan = int(np.flatnonzero(np.isnan(table))[-1]) & (_SIGN - 1)
    infinite = np.flatnonzero(np.isinf(table[:_SIGN]))
    return np.where(np.isinf(values), int(infinite[0]) if len(infinite) else nan, nan)
