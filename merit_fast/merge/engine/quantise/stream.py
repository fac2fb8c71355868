"""One quantised tensor of an output file, made from its float64 values in a scratch file."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from merit_fast.errors import MeritFastError
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.quantise.encode import (
    Array,
    Rounding,
    encode_rows,
    raise_sizes,
    round_scales,
)
from merit_fast.merge.engine.quantise.encoding import Encoding

_SLAB_BYTES = 2 << 20  # of float64 values that are held at a time, if blocks allow
_ITEM = 8


@contextmanager
def scratch_output(files: OpenFiles, folder: Path) -> Iterator[OpenFiles]:
    """The same inputs with a nameless file as output, in the folder of the output."""
    with tempfile.TemporaryFile(dir=folder) as scratch:
        opened = OpenFiles()
        opened.descriptors = files.descriptors
        opened.remote = files.remote
        opened.output = scratch.fileno()
        yield opened


def encode_tensor(
    segment: Segment, scratch: OpenFiles, files: OpenFiles, is_native: bool
) -> Rounding:
    """Encodes a segment's values from a scratch file into the output.

    Args:
        segment: one tensor with an encoding.
        scratch: its output holds the tensor's float64 values, from byte 0 on.
        files: its output gets codes and scales at the segment's offsets.
        is_native: whether merit_fast._C encodes.

    Returns:
        The errors of rounding.
    """
    encoding = segment.encoding
    assert encoding is not None
    total = Rounding()
    matrix = encoding.rows * encoding.columns
    grid_rows, grid_columns = encoding.grid
    for number in range(segment.num_elements // matrix if matrix else 0):
        grid_start = segment.scale_offset + number * grid_rows * grid_columns * encoding.scale_bytes
        place = _Place(
            scratch.output,
            number * matrix * _ITEM,
            segment.output_offset + number * matrix,
            grid_start,
            is_native,
        )
        total.add(_encode_matrix(encoding, place, files))
    return total


class _Place:
    """Where one matrix lies: its values in the scratch file, its codes and scales in the output."""

    def __init__(self, scratch: int, values: int, codes: int, scales: int, is_native: bool) -> None:
        self.is_native = is_native
        self.scratch = scratch
        self.values = values
        self.codes = codes
        self.scales = scales

    def rows(self, first: int, count: int, columns: int) -> Array:
        """[count, columns] values."""
        values = np.empty((count, columns))
        left = memoryview(values).cast("B")
        at = self.values + first * columns * _ITEM
        while left:
            num_bytes = os.preadv(self.scratch, [left], at)
            if not num_bytes:
                raise MeritFastError("a scratch file of a quantised tensor is shorter than it")
            left = left[num_bytes:]
            at += num_bytes
        return values


def _encode_matrix(encoding: Encoding, place: _Place, files: OpenFiles) -> Rounding:
    row_bytes = encoding.columns * _ITEM
    fitting = max(_SLAB_BYTES // row_bytes, 1)
    total = Rounding()
    if encoding.block_rows <= fitting:  # whole blocks are held: one pass
        step = fitting // encoding.block_rows * encoding.block_rows
        for first in range(0, encoding.rows, step):
            values = place.rows(first, min(step, encoding.rows - first), encoding.columns)
            grid_row = first // encoding.block_rows
            sizes = np.zeros((-(-len(values) // encoding.block_rows), encoding.grid[1]))
            raise_sizes(values, encoding, sizes, place.is_native)
            scales, stored = round_scales(sizes, encoding)
            at = place.scales + grid_row * encoding.grid[1] * encoding.scale_bytes
            files.write(stored.tobytes(), at)
            total.add(_write_rows(encoding, values, scales, first, grid_row, place, files))
        return total
    sizes = np.zeros(encoding.grid)
    for first, count, row in _parts_of_blocks(encoding, fitting):
        values = place.rows(first, count, encoding.columns)
        raise_sizes(values, encoding, sizes[row : row + 1], place.is_native)
    scales, stored = round_scales(sizes, encoding)
    files.write(stored.tobytes(), place.scales)
    for first, count, _ in _parts_of_blocks(encoding, fitting):
        values = place.rows(first, count, encoding.columns)
        total.add(_write_rows(encoding, values, scales, first, 0, place, files))
    return total


def _parts_of_blocks(encoding: Encoding, fitting: int) -> Iterator[tuple[int, int, int]]:
    """(first row, rows, row of blocks) of runs that lie in one row of blocks each."""
    for row in range(encoding.grid[0]):
        begin = row * encoding.block_rows
        end = min(begin + encoding.block_rows, encoding.rows)
        for first in range(begin, end, fitting):
            yield first, min(fitting, end - first), row


def _write_rows(
    encoding: Encoding,
    values: Array,
    scales: Array,
    first: int,
    grid_row: int,
    place: _Place,
    files: OpenFiles,
) -> Rounding:
    """Writes the codes of some rows; ``scales`` begin at a row of the grid."""
    start = first - grid_row * encoding.block_rows
    codes, rounding = encode_rows(values, scales, encoding, start, place.is_native)
    files.write(codes.tobytes(), place.codes + first * encoding.columns)
    return rounding


def unencoded(segment: Segment) -> Segment:
    """The segment with its float64 values as output, from byte 0 on."""
    return replace(segment, dtype="F64", output_offset=0, encoding=None)
