"""An adapter's changes of a tensor's values, in NumPy: the definition of each form of change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.kernels.lazy import np
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.read.entries import (
    Added,
    AssembledEntry,
    Change,
    ChangedEntry,
    ExpertsLowRank,
    LowRank,
    Magnitude,
    Rows,
    TensorEntry,
)

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"
Floats: TypeAlias = "npt.NDArray[np.float32]"
Values: TypeAlias = "Callable[[int, int], Array]"  # (first, count) -> elements of a tensor
_PIECE = 1 << 18  # elements that are widened at a time


def apply_change(
    change: Change,
    values: Array,
    entry: TensorEntry,
    first: int,
    files: OpenFiles,
    before: Values,
) -> Array:
    """Elements of a tensor after a change.

    Args:
        values: [n] float64 elements from ``first`` on, with all earlier changes.
        entry: the tensor, for its shape.
        first: number of the first element.
        before: gives any elements of the tensor with all earlier changes.
    """
    if isinstance(change, Rows):
        return _with_rows(change, values, entry, first, files)
    if isinstance(change, Magnitude):
        rows, columns = _places(first, values.size, columns_of(entry))
        factors = length_factors(change, entry, files, before)
        return values * factors[columns if change.by_column else rows]
    left, right = factors_of(change, files)
    return values + change.scaling * _product(left, right, first, values.size)


def factors_of(change: LowRank | ExpertsLowRank | Added, files: OpenFiles) -> tuple[Floats, Floats]:
    """The float32 factors of an added product.

        added.reshape(blocks, -1, cols) = scaling * left.reshape(blocks, -1, rank) @ right

    Returns:
        left [rows, rank] and right [blocks, rank, cols]: one block, or one per expert.
    """
    if isinstance(change, Added):
        vector = floats(change.vector, files)
        return vector.reshape(-1, 1), np.ones((1, 1, 1), np.float32)
    a = floats(change.a, files)
    b = floats(change.b, files)
    if isinstance(change, LowRank):
        a = a.reshape(1, a.shape[0], -1)
        b = b.reshape(1, b.shape[0], -1)
    else:
        a = a.reshape(change.experts, -1, a.shape[1])
        b = np.moveaxis(b.reshape(b.shape[0], -1, change.experts), 2, 0)
    left, right = (a.swapaxes(1, 2), b.swapaxes(1, 2)) if change.transposed else (b, a)
    rank = right.shape[1]
    return np.ascontiguousarray(left).reshape(-1, rank), np.ascontiguousarray(right)


def length_factors(
    change: Magnitude, entry: TensorEntry, files: OpenFiles, before: Values
) -> Array:
    """[rows] or [columns] float64: m_i / |w_i|, by one pass over the tensor that files keep.

    A vector of zeros has no direction: its factor is NaN or infinite, as in PEFT.
    """
    key = (change, entry.name)
    if key not in files.kept:
        lengths = floats(change.lengths, files).ravel().astype(np.float64)
        squares = np.zeros(lengths.size)
        cols = columns_of(entry)
        step = max(_PIECE // cols, 1) * cols
        for at in range(0, entry.num_elements, step):
            piece = before(at, min(step, entry.num_elements - at)).reshape(-1, cols)
            if change.by_column:
                squares += np.einsum("ij,ij->j", piece, piece)
            else:
                squares[at // cols :][: len(piece)] = np.einsum("ij,ij->i", piece, piece)
        with np.errstate(divide="ignore", invalid="ignore"):
            files.kept[key] = lengths / np.sqrt(squares)
    return files.kept[key]


def most_factor_bytes(tensors: Iterable[Iterable[TensorEntry]]) -> int:
    """The most bytes that adapters' factors of one tensor take, in all inputs together."""
    return max((sum(map(factor_bytes, entries)) for entries in tensors), default=0)


def factor_bytes(entry: TensorEntry) -> int:
    """Bytes of the factors that are held while a tensor is read: float32, of all its changes."""
    if isinstance(entry, AssembledEntry):
        sources = {id(part.source): part.source for part in entry.parts}
        return sum(factor_bytes(source) for source in sources.values())
    if not isinstance(entry, ChangedEntry) or entry.source is None:
        return 0
    held = [change for change in entry.changes if not isinstance(change, Rows)]
    factors = sum(4 * stored.num_elements for change in held for stored in change.stored)
    return factors + factor_bytes(entry.source)


def columns_of(entry: TensorEntry) -> int:
    """Columns of a tensor as a matrix: all dimensions after the first, at least 1."""
    return max(math.prod(entry.shape[1:]), 1)


def floats(entry: TensorEntry, files: OpenFiles) -> Floats:
    """A whole stored tensor in float32, widened or narrowed piece by piece."""
    out = np.empty(entry.num_elements, np.float32)
    for at in range(0, out.size, _PIECE):
        count = min(_PIECE, out.size - at)
        bits = np.frombuffer(files.read(entry, at, count), FLOAT_DTYPES[entry.dtype][1])
        out[at : at + count] = to_float64(bits, entry.dtype)
    return out.reshape(entry.shape)


def _product(left: Floats, right: Floats, first: int, count: int) -> Array:
    """Elements of the matrix left @ right of each block; each is summed in the order of ranks."""
    cols = right.shape[2]
    block_rows = left.shape[0] // right.shape[0]
    start = first // cols
    stop = -(-(first + count) // cols)
    total = np.zeros((stop - start, cols))
    for block in range(start // block_rows, -(-stop // block_rows)):
        low = max(start, block * block_rows)
        high = min(stop, (block + 1) * block_rows)
        for r in range(right.shape[1]):
            column = left[low:high, r].astype(np.float64)
            total[low - start : high - start] += np.multiply.outer(column, right[block, r])
    return total.ravel()[first - start * cols :][:count]


def _with_rows(
    change: Rows, values: Array, entry: TensorEntry, first: int, files: OpenFiles
) -> Array:
    out = values.copy()
    cols = entry.shape[-1]
    for number, row in enumerate(change.indices):
        low = max(row * cols, first)
        high = min((row + 1) * cols, first + values.size)
        if low < high:
            start = number * cols + low - row * cols
            bits = np.frombuffer(
                files.read(change.rows, start, high - low), FLOAT_DTYPES[change.rows.dtype][1]
            )
            out[low - first : high - first] = to_float64(bits, change.rows.dtype)
    return out


def _places(
    first: int, count: int, cols: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of each element of a run."""
    rows, columns = np.divmod(np.arange(first, first + count), cols)
    return rows, columns
