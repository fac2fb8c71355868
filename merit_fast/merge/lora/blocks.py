"""The difference of two tensors as a matrix that is read by blocks of rows and never held."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from merit_fast.kernels.average._eager import to_float64
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import TensorEntry

Array = npt.NDArray[np.float64]
_BLOCK = 1 << 19  # elements of a block of rows
_PANEL = 1 << 22  # elements of a block of columns, and of a matrix that is read once


class Difference:
    """tuned - base, of one matrix or of one expert of a stack; up to 32 MiB are read only once.

    Args:
        base: [out, in], or with ``first`` a part of a larger tensor.
        tuned: of the same shape.
        shape: of the matrix.
        first: its first element in both tensors.
        files: holds the files of both.
    """

    def __init__(
        self,
        base: TensorEntry,
        tuned: TensorEntry,
        shape: tuple[int, int],
        first: int,
        files: OpenFiles,
    ) -> None:
        self.shape = shape
        self._pair = (base, tuned)
        self._first = first
        self._files = files
        self._held: Array | None = None  # all of it, once read, where that is small

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """(number of the first row, rows) of the whole matrix."""
        if math.prod(self.shape) > _PANEL:
            yield from self._read()
            return
        if self._held is None:
            self._held = np.concatenate([block for _, block in self._read()])
        yield 0, self._held

    def _read(self) -> Iterator[tuple[int, Array]]:
        rows, cols = self.shape
        step = max(_BLOCK // max(cols, 1), 1)
        for row in range(0, rows, step):
            count = min(step, rows - row)
            at = self._first + row * cols
            base, tuned = (
                to_float64(*values(entry, at, count * cols, self._files)) for entry in self._pair
            )
            yield row, (tuned - base).reshape(count, cols)

    def times(self, right: Array) -> Array:
        """This matrix [out, in] times [in, k]."""
        return np.concatenate([block @ right for _, block in self.blocks()])

    def transposed_times(self, left: Array) -> Array:
        """The transpose [in, out] times [out, k]."""
        total = np.zeros((self.shape[1], left.shape[1]))
        for row, block in self.blocks():
            total += block.T @ left[row : row + len(block)]
        return total

    def gram(self) -> tuple[Array, bool]:
        """The Gram matrix of the shorter side: of the rows [out, out], True; or of the columns."""
        rows, cols = self.shape
        if rows <= cols:
            total = np.zeros((rows, rows))
            step = max(_PANEL // max(rows, 1), 1)
            for first in range(0, cols, step):
                panel = self._panel(first, min(step, cols - first))
                total += panel @ panel.T
            return total, True
        total = np.zeros((cols, cols))
        for _, block in self.blocks():
            total += block.T @ block
        return total, False

    def square(self) -> float:
        """The squared Frobenius norm."""
        return float(sum(np.vdot(block, block) for _, block in self.blocks()))

    def whole(self) -> Array:
        """All rows."""
        return np.concatenate([block for _, block in self.blocks()])

    def _panel(self, first: int, count: int) -> Array:
        """[out, count] columns from ``first`` on."""
        rows, cols = self.shape
        if count == cols:
            return self.whole()
        panel = np.empty((rows, count))
        for row in range(rows):
            at = self._first + row * cols + first
            base, tuned = (
                to_float64(*values(entry, at, count, self._files)) for entry in self._pair
            )
            panel[row] = tuned - base
        return panel
