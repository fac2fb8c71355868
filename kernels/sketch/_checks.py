"""Checks of the sketch's arguments, and batches as examples that lie end to end."""

from collections.abc import Sequence

import torch
from torch import Tensor


def checked_place(
    op: str, width: int, first_row: int, first_column: int, columns: int | None
) -> tuple[int, int, int]:
    """First row, first column and column count of the parameter that holds ``width`` columns."""
    columns = first_column + width if columns is None else columns
    if first_row < 0 or first_column < 0 or first_column + width > columns:
        raise ValueError(
            f"{op}: a part of {width} columns from row {first_row} and column {first_column} on "
            f"does not lie in a parameter of {columns} columns"
        )
    return first_row, first_column, columns


def check_scale(op: str, scale: Tensor | None, shape: Sequence[int]) -> None:
    """Raises ValueError unless ``scale`` has this shape, in which -1 stands for any size."""
    if scale is None:
        return
    fits = scale.dim() == 2 and all(
        wanted in (-1, size) for wanted, size in zip(shape, scale.shape, strict=True)
    )
    if not fits or scale.dtype != torch.float32 or (scale.stride(1) != 1 and scale.shape[1] > 1):
        raise ValueError(
            f"{op}: scale must be float32 {list(shape)} with contiguous rows, "
            f"got {scale.dtype} {list(scale.shape)}"
        )


def end_to_end(op: str, values: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """[N, C], float32 or bfloat16 with contiguous rows, and the examples' offsets [B + 1] int64."""
    if values.dtype not in (torch.float32, torch.bfloat16):
        values = values.float()
    if cu_seqlens is None:
        batch, tokens, width = values.shape
        offsets = torch.arange(batch + 1, device=values.device) * tokens
        values = values.reshape(batch * tokens, width)
    else:
        offsets = _checked_offsets(op, cu_seqlens, values)
    if values.stride(-1) != 1 and values.shape[-1] > 1:
        values = values.contiguous()
    return values, offsets


def _checked_offsets(op: str, cu_seqlens: Tensor, values: Tensor) -> Tensor:
    is_integer = cu_seqlens.dtype in (torch.int64, torch.int32)
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or not is_integer:
        raise ValueError(
            f"{op}: cu_seqlens must be int64 [B + 1], "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.to(values.device, torch.int64).contiguous()
    # Only on a CPU: reading values from a GPU would wait for it.
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        bounds = [0, *offsets.tolist(), len(values)]
        if bounds != sorted(bounds):
            raise ValueError(
                f"{op}: cu_seqlens must rise from 0 to at most {len(values)}, got {bounds[1:-1]}"
            )
    return offsets


def checked_out(
    op: str, out: Tensor | None, batch: int, device: torch.device, proj_dim: int
) -> Tensor:
    """``out``, or new zeros [batch, proj_dim]."""
    shape = (batch, proj_dim)
    if out is None:
        return torch.zeros(shape, dtype=torch.float32, device=device)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise ValueError(
            f"{op}: out must be contiguous float32 {list(shape)}, got {out.dtype} {list(out.shape)}"
        )
    return out
