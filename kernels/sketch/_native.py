"""The sketch's calls of merit_fast._C: where tensors lie becomes addresses and strides."""

from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.sketch._target import SketchTarget


def sketch_rows(gradient: Tensor, row_ids: Tensor | None, target: SketchTarget) -> None:
    """Adds the sketch of the rows of ``gradient`` to the target."""
    native = dispatch.native()
    native.sketch_rows(
        x=_matrix(native, gradient),
        row_ids=0 if row_ids is None else row_ids.data_ptr(),
        target=_target(native, target),
    )


def sketch_linear(dy: Tensor, x: Tensor, target: SketchTarget) -> None:
    """Adds the sketch of every example's dy^T x to the target."""
    native = dispatch.native()
    native.sketch_linear(
        dy=_matrix(native, dy), x=_matrix(native, x), target=_target(native, target)
    )


def token_sums(dy: Tensor, x: Tensor | None, offsets: Tensor, epsilon: float | None) -> Tensor:
    """[B, C] float32: sums over each example's tokens of dy, or of dy * x."""
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


def _target(native: Any, target: SketchTarget) -> Any:
    scale = target.scale
    return native.SketchTarget(
        offsets=target.offsets.data_ptr(),
        examples=target.examples,
        first_row=target.first_row,
        first_col=target.first_column,
        all_cols=target.columns,
        key=target.key & 0xFFFFFFFFFFFFFFFF,
        proj_dim=target.proj_dim,
        group_rows=target.group[0],
        scale=0 if scale is None else scale.data_ptr(),
        scale_stride=0 if scale is None else scale.stride(0),
        out=target.out.data_ptr(),
        threads=torch.get_num_threads(),
    )
