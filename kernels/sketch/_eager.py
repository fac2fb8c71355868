"""The reference of the tiled CountSketch in plain PyTorch, on any device."""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels import _splitmix
from merit_fast.kernels.sketch._target import BUCKET, TILE, SketchTarget, group_shape

HASH_VERSION = 3
_CHUNK_ELEMENTS = 1 << 22
_LOW_HALF = (1 << 32) - 1


def sketch_rows(gradient: Tensor, row_ids: Tensor | None, target: SketchTarget) -> None:
    """Adds the sketch of each example's rows; ``row_ids``: their rows in the parameter."""
    first_row = target.first_row
    step = max(1, _CHUNK_ELEMENTS // (gradient.shape[1] + TILE))
    for b, (start, stop) in enumerate(_ranges(target.offsets)):
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if row_ids is None:
                rows = first_row + torch.arange(first - start, last - start, device=gradient.device)
            else:
                rows = row_ids[first:last]
            values = gradient[first:last].float()
            if target.scale is not None:
                values = values * target.scale[rows - first_row]
            _add(values, rows, target, b)


def sketch_linear(dy: Tensor, x: Tensor, target: SketchTarget) -> None:
    """Adds the sketch of dy^T x of each example."""
    step = max(1, _CHUNK_ELEMENTS // (x.shape[1] + TILE))
    for b, (start, stop) in enumerate(_ranges(target.offsets)):
        inputs = x[start:stop].float()
        for first in range(0, dy.shape[1], step):  # dW of a large head would not fit a GPU
            product = dy[start:stop, first : first + step].float().T @ inputs
            if target.scale is not None:
                product *= target.scale[first : first + step]
            rows = target.first_row + first + torch.arange(len(product), device=dy.device)
            _add(product, rows, target, b)


def _add(values: Tensor, rows: Tensor, target: SketchTarget, example: int) -> None:
    out = target.out[example]
    _add_rows(values, rows, target.first_column, target.columns, target.key, out)


def token_sums(dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None) -> Tensor:
    """[B, C]: sums over each example's tokens of dy, or of dy * x; see ``_ops.token_sums``."""
    product = dy.float()
    if x is not None:
        x = x.float()
        if epsilon is not None:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        product = product * x
    lengths = offsets.diff()
    example = torch.repeat_interleave(torch.arange(len(lengths), device=dy.device), lengths)
    return product.new_zeros(len(lengths), dy.shape[1]).index_add_(0, example, product)


def _add_rows(
    values: Tensor, rows: Tensor, first_column: int, columns: int, key: int, out: Tensor
) -> None:
    """out += the sketch of ``values`` [R, C]: rows ``rows`` of the parameter from first_column."""
    left = first_column // TILE
    values = F.pad(values, (first_column % TILE, -(first_column + values.shape[1]) % TILE))
    strip = rows.div(TILE, rounding_mode="floor").unsqueeze(1)
    tile_column = left + torch.arange(values.shape[1] // TILE, device=out.device)
    across = -(-columns // TILE)
    tile = draw_tiles(strip, tile_column, across, key, len(out) // BUCKET)  # [R, tiles]
    lane = torch.arange(TILE, device=out.device)
    i = (rows % TILE).unsqueeze(1)
    column = lane ^ tile.column_mask.unsqueeze(-1)  # [R, tiles, 64]
    minus = (tile.row_signs >> i & 1).unsqueeze(-1) ^ tile.column_signs.unsqueeze(-1) >> lane & 1
    at = (tile.bucket * TILE + (i ^ tile.row_mask)).unsqueeze(-1) * TILE + column
    out.index_add_(0, at.flatten(), ((1.0 - 2.0 * minus) * values.view(at.shape)).flatten())


@functools.cache
def hash_key(seed: int, name: str) -> int:
    text = f"{HASH_VERSION}\n{seed}\n{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class TileDraws:
    """The draws of some tiles, int64 tensors of one shape."""

    bucket: Tensor
    row_mask: Tensor
    column_mask: Tensor
    row_signs: Tensor
    column_signs: Tensor


def draw_tiles(
    strip: Tensor, tile_column: Tensor, across: int, key: int, buckets: int
) -> TileDraws:
    """The definition's draws for tiles (strip, tile_column), broadcast, of ``across`` in a row."""
    p, q = group_shape(buckets)
    group_row = strip.div(p, rounding_mode="floor")
    group_column = tile_column.div(q, rounding_mode="floor")
    groups_across = -(-across // q)
    deal = hash_counters(8 * (group_row * groups_across + group_column) + 3, key)
    row = (strip + ((deal >> 32 & _LOW_HALF) * p >> 32)) % p
    column = (tile_column + ((deal & _LOW_HALF) * q >> 32)) % q
    tile = strip * across + tile_column
    masks = hash_counters(8 * tile, key)
    row_high = hash_counters(8 * (strip * groups_across + group_column) + 4, key)
    column_high = hash_counters(8 * (group_row * across + tile_column) + 5, key)
    return TileDraws(
        bucket=row * q + column,
        row_mask=row_high & 56 | masks & 7,
        column_mask=column_high & 56 | masks >> 8 & 7,
        row_signs=hash_counters(8 * tile + 1, key),
        column_signs=hash_counters(8 * tile + 2, key),
    )


def hash_counters(counter: Tensor, key: int) -> Tensor:
    """h(counter) of the definition; int64 in, 64 bits as int64 out."""
    bits: Tensor = _splitmix.draw(key, counter)
    return bits


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))
