"""The destination of a gradient's sketch, as every backend receives it."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

TILE = 64  # rows and columns
BUCKET = TILE * TILE


@dataclass(frozen=True)
class SketchTarget:
    """A batch's examples, their gradients' place in the parameter, its hash, and the sums.

    Examples lie end to end along the first dimension of the batch's tensors.
    """

    offsets: Tensor  # [B + 1] int64: first token or row of each example, and their number
    first_row: int
    first_column: int
    columns: int  # of the whole parameter
    key: int  # 64 bits of hash version, seed and parameter name, signed
    scale: Tensor | None  # [rows, columns] of the gradient; of the whole parameter with row ids
    out: Tensor  # [B, D] float32

    @property
    def examples(self) -> int:
        return self.out.shape[0]

    @property
    def proj_dim(self) -> int:
        return self.out.shape[1]

    @property
    def group(self) -> tuple[int, int]:
        """Tiles down and across in a group: one for each bucket."""
        return group_shape(self.proj_dim // BUCKET)


@functools.cache
def group_shape(buckets: int) -> tuple[int, int]:
    """p, the largest divisor of ``buckets`` with p^2 <= buckets, and buckets / p."""
    divisors = (n for n in range(1, buckets + 1) if n * n <= buckets and buckets % n == 0)
    p = max(divisors)
    return p, buckets // p


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the matrix as which a parameter of ``shape`` is hashed.

    [C], a vector, has as many columns as divide C evenly, at most 64: most vectors then lie in one
    group of tiles, where no entries meet. [E, O, I], a stack of matrices (experts), has E O rows;
    the weights of Conv2d and Conv3d, [O, ...], have O rows. A scalar is one entry.
    """
    if len(shape) < 2:
        entries = math.prod(shape)
        columns = max(n for n in range(1, TILE + 1) if entries % n == 0)
        return entries // columns, columns
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[0], math.prod(shape[1:])
