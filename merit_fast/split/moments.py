"""Inner products of block sums, with bits that depend on the two datasets only. Pure NumPy.

A dot product's last bits change with the order of its sum, which a BLAS picks by shape, place,
threads and processor. So every product here is exact: in each chunk of 2048 columns the block sums
of a dataset are rounded to integers

    round(S / 2^k),   k the least with sqrt(G sum_g |S_g|^2) <= 2^(26 + k)   within the chunk

so that, by Cauchy and Schwarz, no partial sum of products of any sums of blocks reaches 2^53, and
float64 holds it without rounding in whatever order. Chunks are then added from the left. A
product's rounding error is some 1e-7 |x| |y|, far below sampling noise. In return, permuted,
extended and cut mixtures give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.errors import MeritFastError

Array = npt.NDArray[np.float64]

_COLUMNS = 2048
_BITS = 26


@dataclass(frozen=True)
class BlockProducts:
    """Products of N datasets' block sums S [G, D]; T = sum_g S_g.

    Everything in split/conflict follows from them.

    Attributes:
        counts: [N, G] examples per block.
        weights: [N, G] n_ig, the sum of the block's weights: of its target tokens, or its examples.
        within: [N, G, G] <S_g, S_h> of one dataset.
        total: [N, N] <T_i, T_j>.
        left_out: [G, N, N] <T_i - S_gi, T_j - S_gj>, block g of both left out.
        halves: [2, N, N] <H_i, H_j> with H the sum of the blocks of even, then of odd number.
        shared: [N, N] pairs of datasets that share rows; None: there is none.
        same_block: [G, N, N] <S_gi, S_gj> of these pairs, else 0; None with ``shared``.
    """

    counts: Array
    weights: Array
    within: Array
    total: Array
    left_out: Array
    halves: Array
    shared: npt.NDArray[np.bool_] | None = None
    same_block: Array | None = None

    def independent(self, products: Array, blocks: npt.NDArray[np.intp]) -> tuple[Array, Array]:
        """Products and pairs of examples that are independent of each other.

            sum_{a != b} <S_ia, S_jb>   and   sum_{a != b} n_ia n_jb   of datasets that share rows

        A row lies in the same block of all datasets that have it, so pairs of different blocks hold
        no row twice. Of other pairs all blocks count.

        Args:
            products: [N, N] of the sums over ``blocks``.
            blocks: numbers of the blocks.
        """
        weights = self.weights[:, blocks]
        number = weights.sum(1)
        pairs = np.outer(number, number)
        if self.shared is None or self.same_block is None:
            return products, pairs
        both = np.zeros(pairs.shape)
        for block in blocks:
            products = products - self.same_block[block]
            both += np.outer(self.weights[:, block], self.weights[:, block])
        return products, np.where(self.shared, pairs - both, pairs)


def block_products(
    block_sums: Sequence[Any] | npt.NDArray[Any],
    block_counts: npt.NDArray[Any],
    block_weights: npt.NDArray[Any] | None = None,
    shared: npt.NDArray[np.bool_] | None = None,
    advance: Callable[[float], Any] = lambda _: None,
) -> BlockProducts:
    """Computes G + 3 symmetric products of [N, D], and G of the datasets that share rows.

    Takes about (G + 3) N^2 D operations and 8 (G + 2) N 2048 bytes.

    Args:
        block_sums: N arrays [G, D] float64, or one [N, G, D]. Columns are read once, 2048 at a
            time, so memory-mapped ones need not fit into memory.
        block_counts: [N, G] examples in each block.
        block_weights: [N, G] n_ig, the sum of their weights; None: each counts 1.
        shared: [N, N] symmetric, pairs of datasets that share rows; None: none does.
        advance: called with the number of columns read.

    Raises:
        MeritFastError: a block sum is infinite or not a number, or a dataset has fewer than two
            blocks with examples.
    """
    counts = np.asarray(block_counts, np.float64)
    number, blocks = counts.shape
    few = np.flatnonzero((counts > 0).sum(1) < 2)
    if len(few):
        raise MeritFastError(
            f"split: dataset {few[0]} needs examples in two blocks or more, got {counts[few[0]]}"
        )
    sums = np.zeros((blocks + 3, number, number))  # total, G left out, two halves
    within = np.zeros((number, blocks, blocks))
    product = np.empty((number, number))
    sharing = np.flatnonzero(_off_diagonal(shared, number).any(1))
    same = np.zeros((blocks, len(sharing), len(sharing)))
    for integers, unit in _integer_chunks(block_sums, number, blocks):
        by_dataset = integers.transpose(1, 0, 2)
        within += np.matmul(by_dataset, by_dataset.transpose(0, 2, 1)) * (unit**2)[:, None, None]
        units = np.outer(unit, unit)
        for i, rows in enumerate(_sums_of_blocks(integers)):
            np.matmul(rows, rows.T, out=product)
            np.multiply(product, units, out=product)
            sums[i] += product
        for g, block in enumerate(integers if len(sharing) else ()):
            rows = block[sharing]
            same[g] += rows @ rows.T * units[np.ix_(sharing, sharing)]
        advance(integers.shape[2])
    weights = counts if block_weights is None else np.asarray(block_weights, np.float64)
    products = BlockProducts(
        counts, weights, within, sums[0], sums[1 : blocks + 1], sums[blocks + 1 :]
    )
    if not len(sharing):
        return products
    pairs = _off_diagonal(shared, number)
    same_block = np.zeros((blocks, number, number))
    same_block[:, sharing[:, None], sharing] = same
    return replace(products, shared=pairs, same_block=np.where(pairs, same_block, 0.0))


def _off_diagonal(shared: npt.NDArray[np.bool_] | None, number: int) -> npt.NDArray[np.bool_]:
    pairs = np.zeros((number, number), bool) if shared is None else np.array(shared, bool)
    np.fill_diagonal(pairs, False)
    return pairs


def _sums_of_blocks(integers: Array) -> Iterator[Array]:
    """Yields [N, C] each: T, T - S_g for every g, the even half, the odd half."""
    total = integers.sum(0)
    yield total
    rows = np.empty_like(total)
    for block in integers:
        yield np.subtract(total, block, out=rows)
    even = integers[::2].sum(0)
    yield even
    yield np.subtract(total, even, out=rows)


def _integer_chunks(
    block_sums: Sequence[Any] | npt.NDArray[Any], number: int, blocks: int
) -> Iterator[tuple[Array, Array]]:
    """Yields, per chunk of columns, integers [G, N, C] and their unit [N], a power of two."""
    width = block_sums[0].shape[1] if number else 0
    buffer = np.empty((blocks, number, min(width, _COLUMNS)))
    for start in range(0, width, _COLUMNS):
        chunk = buffer[:, :, : width - start] if width - start < _COLUMNS else buffer
        for i in range(number):
            chunk[:, i] = block_sums[i][:, start : start + _COLUMNS]
        square = np.sum([np.einsum("nc,nc->n", rows, rows) for rows in chunk], axis=0)
        if not np.isfinite(square).all():
            raise MeritFastError(
                f"split: the block sums of dataset {np.argmin(np.isfinite(square))} are not finite"
            )
        exponent = np.frexp(np.sqrt(blocks * square))[1] - _BITS
        chunk *= np.ldexp(1.0, -exponent)[:, None]
        yield np.rint(chunk, out=chunk), np.ldexp(1.0, exponent)
