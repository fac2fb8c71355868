"""The reference of the tiled CountSketch in plain PyTorch, on any device."""

import functools
import hashlib

import torch
from torch import Tensor
from torch.nn import functional as F

HASH_VERSION = 2
TILE = 64
_CHUNK_ELEMENTS = 1 << 22


def sketch_rows(
    gradient: Tensor,
    offsets: Tensor,
    row_ids: Tensor | None,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    first_row, first_column, columns = place
    step = max(1, _CHUNK_ELEMENTS // (gradient.shape[1] + TILE))
    for b, (start, stop) in enumerate(_ranges(offsets)):
        for first in range(start, stop, step):
            last = min(first + step, stop)
            if row_ids is None:
                rows = first_row + torch.arange(first - start, last - start, device=gradient.device)
            else:
                rows = row_ids[first:last]
            values = gradient[first:last].float()
            if scale is not None:
                values = values * scale[rows - first_row]
            _add_rows(values, rows, first_column, columns, key, out[b])


def sketch_linear(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    first_row, first_column, columns = place
    step = max(1, _CHUNK_ELEMENTS // (x.shape[1] + TILE))
    for b, (start, stop) in enumerate(_ranges(offsets)):
        inputs = x[start:stop].float()
        for first in range(0, dy.shape[1], step):  # dW of a large head would not fit a GPU
            product = dy[start:stop, first : first + step].float().T @ inputs
            if scale is not None:
                product *= scale[first : first + step]
            rows = first_row + first + torch.arange(len(product), device=dy.device)
            _add_rows(product, rows, first_column, columns, key, out[b])


def token_sums(dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None) -> Tensor:
    product = dy.float()
    if x is not None:
        x = x.float()
        product = product * (
            x if epsilon is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
        )
    lengths = offsets.diff()
    example = torch.repeat_interleave(torch.arange(len(lengths), device=dy.device), lengths)
    return product.new_zeros(len(lengths), dy.shape[1]).index_add_(0, example, product)


def _add_rows(
    values: Tensor, rows: Tensor, first_column: int, columns: int, key: int, out: Tensor
) -> None:
    """out += the sketch of ``values`` [R, C], which are rows ``rows`` and columns first_column.. of the parameter."""
    across, buckets = -(-columns // TILE), len(out) // TILE**2
    left = first_column // TILE
    values = F.pad(values, (first_column % TILE, -(first_column + values.shape[1]) % TILE))
    tiles = rows.div(TILE, rounding_mode="floor").unsqueeze(1) * across + left
    tiles = tiles + torch.arange(values.shape[1] // TILE, device=out.device)  # [R, tiles]
    lane = torch.arange(TILE, device=out.device)
    masks = hash_counters(4 * tiles, key)
    row = (rows % TILE).unsqueeze(1) ^ masks & 63
    column = lane ^ (masks >> 8 & 63).unsqueeze(-1)  # [R, tiles, 64]
    row_sign = hash_counters(4 * tiles + 1, key) >> (rows % TILE).unsqueeze(1) & 1
    column_sign = hash_counters(4 * tiles + 2, key).unsqueeze(-1) >> lane & 1
    sign = 1.0 - 2.0 * (row_sign.unsqueeze(-1) ^ column_sign)
    bucket = bucket_of(tiles, key, buckets)
    at = (bucket * TILE + row).unsqueeze(-1) * TILE + column
    out.index_add_(0, at.flatten(), (sign * values.view(at.shape)).flatten())


@functools.cache
def hash_key(seed: int, name: str) -> int:
    text = f"{HASH_VERSION}\n{seed}\n{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def bucket_of(tiles: Tensor, key: int, buckets: int) -> Tensor:
    """Of every ``buckets`` tiles in a row each gets a bucket of its own, from a random one on."""
    deal = hash_counters(4 * tiles.div(buckets, rounding_mode="floor") + 3, key)
    return (tiles + (_logical_shift(deal, 32) * buckets >> 32)) % buckets


def hash_counters(counter: Tensor, key: int) -> Tensor:
    """SplitMix64's finalizer of key + (counter + 1) * golden ratio; int64 in, int64 bits out (products wrap)."""
    z = key + (counter + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _logical_shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _logical_shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _logical_shift(z, 31)


def _ranges(offsets: Tensor) -> list[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(zip(bounds[:-1], bounds[1:], strict=True))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return z >> bits & (1 << 64 - bits) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
