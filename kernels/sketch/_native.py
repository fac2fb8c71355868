"""The sketch's calls of merit_fast._C: where tensors lie becomes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch


def sketch_rows(
    gradient: Tensor,
    offsets: Tensor,
    row_ids: Tensor | None,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    native = dispatch.native()
    native.sketch_rows(
        x=_matrix(native, gradient),
        row_ids=0 if row_ids is None else row_ids.data_ptr(),
        target=_target(native, offsets, place, key, out, scale),
    )


def sketch_linear(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None,
) -> None:
    native = dispatch.native()
    native.sketch_linear(
        dy=_matrix(native, dy),
        x=_matrix(native, x),
        target=_target(native, offsets, place, key, out, scale),
    )


def token_sums(dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None) -> Tensor:
    native = dispatch.native()
    out = torch.zeros(len(offsets) - 1, dy.shape[1], dtype=torch.float32)
    native.token_sums(
        dy=_matrix(native, dy),
        x=None if x is None else _matrix(native, x),
        offsets=offsets.data_ptr(),
        examples=len(out),
        epsilon=epsilon,
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out


def _matrix(native: Any, values: Tensor) -> Any:
    return native.SketchMatrix(
        data=values.data_ptr(),
        bf16=values.dtype == torch.bfloat16,
        cols=values.shape[1],
        row_stride=values.stride(0),
    )


def _target(
    native: Any,
    offsets: Tensor,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None,
) -> Any:
    first_row, first_column, columns = place
    return native.SketchTarget(
        offsets=offsets.data_ptr(),
        examples=out.shape[0],
        first_row=first_row,
        first_col=first_column,
        all_cols=columns,
        key=key & 0xFFFFFFFFFFFFFFFF,
        proj_dim=out.shape[1],
        scale=0 if scale is None else scale.data_ptr(),
        scale_stride=0 if scale is None else scale.stride(0),
        out=out.data_ptr(),
        threads=torch.get_num_threads(),
    )
