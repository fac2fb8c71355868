"""An input's values in NumPy, as the engine makes them, and errors about non-finite ones."""

import numpy as np
import numpy.typing as npt

from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.checkpoint import TensorEntry
from merit_fast.merge.read.decoded import DecodedEntry, Scales

Array = npt.NDArray[np.float64]


def float8_table(dtype: str) -> Array:
    """[256] value of every code of an 8-bit float (OCP 8-bit Floating Point Specification)."""
    mantissa, bias = (3, 7) if dtype == "F8_E4M3" else (2, 15)
    codes = np.arange(256)
    exponent = (codes & 127) >> mantissa
    fraction = (codes & ((1 << mantissa) - 1)) / (1 << mantissa)
    values = np.where(
        exponent > 0, np.ldexp(1.0 + fraction, exponent - bias), np.ldexp(fraction, 1 - bias)
    )
    if dtype == "F8_E4M3":
        values[(codes & 127) == 127] = np.nan
    else:
        values[exponent == 31] = np.where(fraction[exponent == 31] > 0, np.nan, np.inf)
    return np.where(codes & 128, -values, values)


def factors(entry: DecodedEntry, files: OpenFiles) -> tuple[np.ndarray, np.ndarray] | None:
    """(left [rows, rank], right [rank, cols]): float32 factors of an adapter's change."""
    if entry.low_rank is None:
        return None
    a = files.small_array(entry.low_rank.a)
    b = files.small_array(entry.low_rank.b)
    left, right = (a.T, b.T) if entry.low_rank.transposed else (b, a)
    return np.ascontiguousarray(left, np.float32), np.ascontiguousarray(right, np.float32)


def scale_grid(scales: Scales, files: OpenFiles) -> Array:
    """[row blocks, column blocks] the factors of a tensor of 8-bit floats."""
    grid = files.small_array(scales.entry)
    return np.ascontiguousarray(grid.reshape(grid.shape if grid.ndim == 2 else (grid.size, 1)))


def values(entry: TensorEntry, first: int, count: int, files: OpenFiles) -> tuple[np.ndarray, str]:
    """Elements of an input and their dtype: as stored (bf16 as uint16 bits), or decoded float64."""
    data = files.read(entry, first, count)
    if not isinstance(entry, DecodedEntry):
        return np.frombuffer(data, FLOAT_DTYPES[entry.dtype][1]), entry.dtype
    cols = entry.shape[-1] if entry.shape else 1
    rows, columns = np.divmod(np.arange(first, first + count), cols)
    if entry.dtype in FLOAT_DTYPES:
        decoded = to_float64(np.frombuffer(data, FLOAT_DTYPES[entry.dtype][1]), entry.dtype)
    else:
        decoded = float8_table(entry.dtype)[np.frombuffer(data, np.uint8)]
        if entry.scales is not None:
            grid = scale_grid(entry.scales, files)
            decoded = (
                decoded * grid[rows // entry.scales.block_rows, columns // entry.scales.block_cols]
            )
    pair = factors(entry, files)
    if pair is not None and entry.low_rank is not None:
        change = np.zeros(count)
        for r in range(pair[0].shape[1]):
            change += pair[0][rows, r].astype(np.float64) * pair[1][r, columns].astype(np.float64)
        decoded = decoded + entry.low_rank.scaling * change
    return decoded, "F64"


def finite(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray((array & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(array))


def nonfinite_error(segment: Segment, chunk: int, step: int, files: OpenFiles) -> OptionError:
    """An error about the first bad element of the chunk, with its tensor and its input."""
    count = min(step, segment.num_elements - chunk)
    for entry in segment.inputs:
        bad = np.flatnonzero(~finite(*values(entry, chunk, count, files)))
        if len(bad):
            name = segment.name_at(chunk + int(bad[0]))
            return _nonfinite(f"{entry.file}: {name}: must be finite, holds NaN or infinity")
    name = segment.name_at(chunk)
    return _nonfinite(f"{segment.inputs[0].file}: {name}: the result overflows {segment.dtype}")


def _nonfinite(rule: str) -> OptionError:
    return OptionError(rule, "allow_nonfinite", "{} writes it anyway", "True")
