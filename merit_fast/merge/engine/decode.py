"""Quantised tensors in NumPy: codes, scales and zero points become float64 values."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.kernels.lazy import np
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.read.entries import DecodedEntry, Grid
from merit_fast.merge.read.quantised.codes import CODES

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
Integers: TypeAlias = "npt.NDArray[np.int64]"
_WORD_BITS = 32  # packed zero points lie in words of this size


@cache
def code_values(name: str) -> Array:
    """[2^bits] value of every code."""
    return np.array(CODES[name].values)


def code_bits(name: str) -> int:
    """Bits of a code."""
    return CODES[name].bits


def unpack(rows: npt.NDArray[np.uint8], starts: Integers, bits: int) -> npt.NDArray[np.uint16]:
    """[n, m] codes of ``bits`` bits.

    Args:
        rows: [n, bytes] packed codes.
        starts: [m] first bit of each code in its row; the lowest bit of a byte comes first.
    """
    padded = np.pad(rows, ((0, 0), (0, 1))).astype(np.uint16)
    byte = starts // 8
    pair = padded[:, byte] | padded[:, byte + 1] << np.uint16(8)
    return np.asarray(pair >> (starts % 8).astype(np.uint16) & np.uint16((1 << bits) - 1))


def decoded(entry: DecodedEntry, first: int, count: int, files: OpenFiles) -> Array:
    """Elements ``first`` to ``first + count`` of a quantised tensor, as its class defines them."""
    columns = entry.shape[-1] if entry.shape else 1
    # Infinities and NaN propagate, as in any product.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total = code_values(entry.dtype)[_codes(entry, first, count, columns, files)]
        if not entry.grids:
            return np.asarray(total)
        row, column = np.divmod(np.arange(first, first + count), columns)
        if entry.zeros is not None:
            total = total - _numbers(entry.zeros, row, column, files)
        for grid in entry.scales:
            scale = _numbers(grid, row, column, files)
            total = total / scale if grid.divides else total * scale
    return np.asarray(total)


def _codes(
    entry: DecodedEntry, first: int, count: int, columns: int, files: OpenFiles
) -> npt.NDArray[np.uint16]:
    codes = entry.codes
    assert codes is not None
    bits = CODES[entry.dtype].bits
    row_bytes = codes.num_bytes * columns // entry.num_elements
    if row_bytes * 8 == columns * bits:  # rows follow each other without padding
        start = first * bits // 8
        stop = -(-(first + count) * bits // 8)
        raw = np.frombuffer(files.read_bytes(codes, start, stop - start), np.uint8)
        if bits == 8:
            return raw.astype(np.uint16)
        places = first * bits - start * 8 + bits * np.arange(count)
        return np.asarray(unpack(raw[None], places, bits)[0])
    row = first // columns
    num_rows = (first + count - 1) // columns + 1 - row
    raw = np.frombuffer(files.read_bytes(codes, row * row_bytes, num_rows * row_bytes), np.uint8)
    rows = unpack(raw.reshape(num_rows, row_bytes), bits * np.arange(columns), bits)
    begin = first - row * columns
    return np.asarray(rows.ravel()[begin : begin + count])


def _numbers(grid: Grid, row: Integers, column: Integers, files: OpenFiles) -> Array:
    """The grid's number for each element; only the grid's rows in use are read."""
    grid_row = row // grid.rows * grid.shape[0] + row % grid.rows // grid.block_rows
    if grid.columns is not None:
        order = np.frombuffer(files.read(grid.columns, 0, grid.columns.num_elements), np.int32)
        grid_column = order[column].astype(np.int64)
    else:
        grid_column = column // grid.block_cols
    low = int(grid_row.min())
    loaded = _rows(grid, low, int(grid_row.max()) + 1 - low, files)
    return np.asarray(loaded[grid_row - low, grid_column])


def _rows(grid: Grid, first: int, count: int, files: OpenFiles) -> Array:
    """[count, columns] rows of a grid."""
    columns = grid.shape[1]
    if not grid.code:
        data = files.read(grid.entry, first * columns, count * columns)
        stored = np.frombuffer(data, FLOAT_DTYPES[grid.entry.dtype][1])
        return to_float64(stored, grid.entry.dtype).reshape(count, columns)
    table = code_values(grid.code)
    if not grid.packed_rows:
        data = files.read_bytes(grid.entry, first * columns, count * columns)
        return np.asarray(table[np.frombuffer(data, np.uint8)].reshape(count, columns))
    bits = CODES[grid.code].bits
    word = first * bits // _WORD_BITS
    num_words = ((first + count) * bits - 1) // _WORD_BITS + 1 - word
    data = files.read(grid.entry, word * columns, num_words * columns)
    words = np.frombuffer(data, np.uint8).reshape(num_words, columns, _WORD_BITS // 8)
    by_column = np.ascontiguousarray(words.transpose(1, 0, 2)).reshape(columns, -1)
    places = bits * np.arange(first, first + count) - word * _WORD_BITS
    return np.asarray(table[unpack(by_column, places, bits)].T)
