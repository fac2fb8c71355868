"""The reference of the blocked CountSketch in plain PyTorch, on any device."""

import torch
from torch import Tensor
from torch.nn import functional as F

_MASK32 = 0xFFFFFFFF
_CHUNK_ELEMENTS = 1 << 24


def sketch_rows(gradient: Tensor, row_ids: Tensor | None, first_row: int, key: int, out: Tensor) -> None:
    batch, rows, columns = gradient.shape
    blocks = -(-columns // 16)
    if row_ids is None:
        row_ids = torch.arange(first_row, first_row + rows, device=gradient.device).expand(batch, rows)
    block = row_ids.unsqueeze(-1) * blocks + torch.arange(blocks, device=gradient.device)  # [B, R, blocks]
    h = hash_blocks(block, key).unsqueeze(-1)  # [B, R, blocks, 1]
    lane = torch.arange(16, device=gradient.device) ^ _shift_right(h, 16) & 15  # [B, R, blocks, 16]
    bucket = _shift_right(h, 32) * (out.shape[1] // 16) >> 32
    sign = 1.0 - 2.0 * (_shift_right(h, 0) >> lane & 1)
    values = F.pad(gradient.float(), (0, blocks * 16 - columns)).view(batch, rows, blocks, 16)
    out.scatter_add_(1, (bucket * 16 + lane).flatten(1), (sign * values).flatten(1))


def sketch_linear(dy_t: Tensor, x: Tensor, key: int, out: Tensor) -> None:
    batch, rows, _ = dy_t.shape
    step = max(1, _CHUNK_ELEMENTS // (batch * x.shape[2]))
    for first in range(0, rows, step):  # dW of a large head would not fit a GPU
        sketch_rows(torch.bmm(dy_t[:, first : first + step], x), None, first, key, out)


def hash_blocks(block: Tensor, key: int) -> Tensor:
    """SplitMix64's finalizer of key + (block + 1) * golden ratio; int64 in, int64 bits out (products wrap)."""
    z = key + (block + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _logical_shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _logical_shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _logical_shift(z, 31)


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return z >> bits & (1 << 64 - bits) - 1


def _shift_right(h: Tensor, bits: int) -> Tensor:
    return h >> bits & _MASK32


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
