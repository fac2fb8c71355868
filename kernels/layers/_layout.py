"""Tensors as rows with one stride, and as heads: views where memory allows, else copies."""

from collections.abc import Sequence

import torch
from torch import Tensor


def empty_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An unfilled tensor of x's shape: last dimension dense, the others in x's order."""
    if x.is_contiguous():
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    out = torch.empty_like(x, dtype=dtype)
    return out if out.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype, device=x.device)


def as_rows(x: Tensor, out: Tensor) -> tuple[Tensor, int]:
    """x, or a copy, and the stride of its rows in the row order of ``out`` (``empty_rows``)."""
    if x.is_contiguous() and out.is_contiguous():
        return x, x.shape[-1]
    order = sorted(range(out.dim() - 1), key=out.stride)
    stride = _stride_of_rows(x, order)
    if stride is None:
        x = torch.empty_strided(out.shape, out.stride(), dtype=x.dtype, device=x.device).copy_(x)
        stride = _stride_of_rows(x, order)
        assert stride is not None
    return x, stride


def _stride_of_rows(x: Tensor, order: Sequence[int]) -> int | None:
    """The stride of rows along dimensions ``order``, innermost first, or None if it varies."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return None
    stride = following = None
    for dimension in order:
        if x.shape[dimension] == 1:
            continue
        if stride is None:
            stride = x.stride(dimension)
        elif x.stride(dimension) != following:
            return None
        following = x.stride(dimension) * x.shape[dimension]
    return x.shape[-1] if stride is None else stride


def heads_inside(x: Tensor) -> bool:
    """Whether x [B, heads, T, R] is a transposed [B, T, heads, R]."""
    return x.stride(1) < x.stride(2)


def empty_heads(x: Tensor, dtype: torch.dtype, inside: bool) -> Tensor:
    """An unfilled dense tensor of x's shape [B, heads, T, R]; ``inside``: as [B, T, heads, R]."""
    batch, heads, tokens, width = x.shape
    if inside:
        out = torch.empty(batch, tokens, heads, width, dtype=dtype, device=x.device)
        return out.transpose(1, 2)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def dense_rows(x: Tensor) -> Tensor:
    """x, or a copy whose last dimension is dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
