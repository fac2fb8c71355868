"""One quantised tensor of an output file, made from its float64 values in a scratch file."""

import math
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from merit_fast.errors import MeritFastError
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.engine.quantise.encode import (
    Array,
    Codes,
    encode_rows,
    raise_sizes,
    round_scales,
)
from merit_fast.merge.engine.quantise.encoding import Encoding
from merit_fast.merge.engine.quantise.needs import SLAB_BYTES, VALUE_BYTES
from merit_fast.merge.engine.quantise.rounding import Rounding
from merit_fast.records import record, replace

Slab = tuple[int, int, int]  # first row, rows, row of blocks


@contextmanager
def scratch_output(files: OpenFiles, folder: Path) -> Iterator[OpenFiles]:
    """Open files with the same inputs, and a nameless file in ``folder`` as their output."""
    with tempfile.TemporaryFile(dir=folder) as scratch:
        opened = OpenFiles()
        opened.descriptors = files.descriptors
        opened.remote = files.remote
        opened.output = scratch.fileno()
        yield opened


def encode_tensor(
    segment: Segment, scratch: OpenFiles, files: OpenFiles, is_native: bool, threads: int
) -> Rounding:
    """Encodes a segment's values from a scratch file into the output.

    Args:
        segment: one tensor with an encoding.
        scratch: its output holds the tensor's float64 values, from byte 0 on.
        files: its output gets codes and scales at the segment's offsets.
        is_native: whether merit_fast._C encodes.
        threads: slabs of rows that are encoded at a time; the sums do not depend on it.

    Returns:
        The errors of rounding.
    """
    encoding = segment.encoding
    assert encoding is not None
    total = Rounding()
    matrix = encoding.rows * encoding.columns
    grid_bytes = math.prod(encoding.grid) * encoding.scale_bytes
    with ThreadPoolExecutor(threads) as pool:
        for number in range(segment.num_elements // matrix if matrix else 0):
            place = _Matrix(
                encoding,
                scratch.output,
                number * matrix * VALUE_BYTES,
                segment.output_offset + number * matrix,
                segment.scale_offset + number * grid_bytes,
                files,
                is_native,
            )
            for rounding in place.encode(pool):
                total += rounding
    return total


@record
class _Matrix:
    """Where one matrix lies: its values in the scratch file, its codes and scales in the output."""

    encoding: Encoding
    scratch: int
    values_at: int
    codes_at: int
    scales_at: int
    files: OpenFiles
    is_native: bool

    def encode(self, pool: Executor) -> Iterator[Rounding]:
        """Writes codes and scales; yields the errors slab by slab."""
        encoding = self.encoding
        fitting = max(SLAB_BYTES // (encoding.columns * VALUE_BYTES), 1)
        if encoding.block_rows <= fitting:  # whole blocks are held: one pass
            step = fitting // encoding.block_rows * encoding.block_rows
            firsts = range(0, encoding.rows, step)
            return pool.map(lambda first: self._encode_blocks(first, step), firsts)
        slabs = [*_parts_of_blocks(encoding, fitting)]
        sizes = np.zeros(encoding.grid)
        for (_, _, row), part in zip(slabs, pool.map(self._sizes_of_slab, slabs), strict=True):
            np.maximum(sizes[row], part, out=sizes[row])
        scales, stored = round_scales(sizes, encoding)
        self.files.write(stored.tobytes(), self.scales_at)
        return pool.map(lambda slab: self._encode_slab(slab, scales), slabs)

    def _encode_blocks(self, first: int, step: int) -> Rounding:
        """Encodes whole blocks of rows, with their scales."""
        encoding = self.encoding
        values = self._rows(first, min(step, encoding.rows - first))
        sizes = np.zeros((-(-len(values) // encoding.block_rows), encoding.grid[1]))
        raise_sizes(values, encoding, sizes, self.is_native)
        scales, stored = round_scales(sizes, encoding)
        before = first // encoding.block_rows * encoding.grid[1]
        self.files.write(stored.tobytes(), self.scales_at + before * encoding.scale_bytes)
        codes, rounding = encode_rows(values, scales, encoding, 0, self.is_native)
        self._write_codes(codes, first)
        return rounding

    def _sizes_of_slab(self, slab: Slab) -> Array:
        first, count, _ = slab
        sizes = np.zeros((1, self.encoding.grid[1]))
        raise_sizes(self._rows(first, count), self.encoding, sizes, self.is_native)
        return np.asarray(sizes[0])

    def _encode_slab(self, slab: Slab, scales: Array) -> Rounding:
        first, count, _ = slab
        values = self._rows(first, count)
        codes, rounding = encode_rows(values, scales, self.encoding, first, self.is_native)
        self._write_codes(codes, first)
        return rounding

    def _rows(self, first: int, count: int) -> Array:
        """[count, columns] values."""
        columns = self.encoding.columns
        values = np.empty((count, columns))
        left = memoryview(values.data).cast("B")
        at = self.values_at + first * columns * VALUE_BYTES
        while left:
            num_bytes = os.preadv(self.scratch, [left], at)
            if not num_bytes:
                raise MeritFastError("the scratch file of a quantised tensor has lost its end")
            left = left[num_bytes:]
            at += num_bytes
        return values

    def _write_codes(self, codes: Codes, first: int) -> None:
        self.files.write(codes.tobytes(), self.codes_at + first * self.encoding.columns)


def _parts_of_blocks(encoding: Encoding, fitting: int) -> Iterator[Slab]:
    """Runs that lie in one row of blocks each."""
    for row in range(encoding.grid[0]):
        begin = row * encoding.block_rows
        end = min(begin + encoding.block_rows, encoding.rows)
        for first in range(begin, end, fitting):
            yield first, min(fitting, end - first), row


def unencoded(segment: Segment) -> Segment:
    """The segment with its float64 values as output, from byte 0 on."""
    return replace(segment, dtype="F64", output_offset=0, encoding=None)
