"""Layouts of a CountSketch for ``bench.sketch.layout``: where each entry goes, and its sign.

Written from the definitions, apart from the kernels: tests compare the last version with them.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from merit_fast.kernels import _splitmix
from merit_fast.kernels.sketch import CountSketch


@dataclass(frozen=True)
class Block:
    """Entries of two gradients: of T tiles some rows and columns; all others are zero."""

    top: Tensor  # [T] int64: which strip of 64 rows each tile is in
    left: Tensor  # [T] int64: which strip of 64 columns
    rows: Tensor  # [T, A] int64: which of the 64 rows
    columns: Tensor  # [T, C] int64
    values: Tensor  # [2, T, A, C] float32


@dataclass(frozen=True)
class Draws:
    """Bucket and masks that the hash draws, one of each a tile."""

    bucket: Tensor
    row_mask: Tensor
    column_mask: Tensor


Draw = Callable[[int, Tensor, Tensor, int, int], Draws]


def sketch(block: Block, width: int, seed: int, proj_dim: int, draw: Draw) -> Tensor:
    """[2, D] sketches of "w": tiles of 64 x 64, permuted by XOR, with signs by row and column."""
    key = CountSketch(4096, seed).key("w")
    across = -(-width // 64)
    tile = block.top * across + block.left
    drawn = draw(key, block.top, block.left, across, proj_dim // 4096)
    row = drawn.bucket.unsqueeze(1) * 64 + (block.rows ^ drawn.row_mask.unsqueeze(1))
    column = block.columns ^ drawn.column_mask.unsqueeze(1)
    at = (64 * row).unsqueeze(2) + column.unsqueeze(1)
    row_sign = sign(bits(key, 8 * tile + 1), block.rows)
    column_sign = sign(bits(key, 8 * tile + 2), block.columns)
    signed = block.values * row_sign.unsqueeze(2) * column_sign.unsqueeze(1)
    out = torch.zeros(2, proj_dim)
    for row_of_out, values in zip(out, signed, strict=True):  # along one dimension it is fast
        row_of_out.index_add_(0, at.flatten(), values.flatten())
    return out


def in_line(key: int, top: Tensor, left: Tensor, across: int, buckets: int) -> Draws:
    """Deals M tiles in a row to M buckets, as hash version 2 does."""
    tile = top * across + left
    masks = bits(key, 8 * tile)
    bucket = (tile + below(bits(key, 8 * (tile // buckets) + 3) >> 32, buckets)) % buckets
    return Draws(bucket, masks & 63, masks >> 8 & 63)


def in_rectangles(
    key: int, top: Tensor, left: Tensor, across: int, buckets: int, *, high: str, low: str
) -> Draws:
    """Deals p x q tiles to p x q buckets; bits 3-5 and 0-2 of the masks by "tile" or "strip"."""
    p = max(n for n in range(1, buckets + 1) if buckets % n == 0 and n * n <= buckets)
    q = buckets // p
    wide = -(-across // q)
    deal = bits(key, 8 * (top // p * wide + left // q) + 3)
    row = (top % p + below(deal >> 32, p)) % p
    column = (left % q + below(deal, q)) % q
    by_tile = bits(key, 8 * (top * across + left))
    by_row = bits(key, 8 * (top * wide + left // q) + 4)
    by_column = bits(key, 8 * (top // p * across + left) + 5)
    masks = {"tile": (by_tile, by_tile >> 8), "strip": (by_row, by_column)}
    x, y = (masks[high][side] & 56 | masks[low][side] & 7 for side in (0, 1))
    return Draws(row * q + column, x, y)


def bits(key: int, counter: Tensor) -> Tensor:
    drawn: Tensor = _splitmix.draw(key, counter)
    return drawn


def below(drawn: Tensor, count: int) -> Tensor:
    """A number below ``count`` from the lower 32 bits."""
    return (drawn & 0xFFFFFFFF) * count >> 32


def sign(drawn: Tensor, index: Tensor) -> Tensor:
    """1 or -1 by the bits numbered ``index``."""
    return 1.0 - 2.0 * (drawn.unsqueeze(1) >> index & 1)


def _rectangles(high: str, low: str) -> Draw:
    return functools.partial(in_rectangles, high=high, low=low)


LAYOUTS: dict[str, Draw] = {
    "in line (version 2)": in_line,
    "rectangles, masks by tile": _rectangles("tile", "tile"),
    "rectangles, high bits by strip (version 3)": _rectangles("strip", "tile"),
    "rectangles, masks by strip": _rectangles("strip", "strip"),
}
