"""The CountSketch in Triton: how the kernels of ``_triton_kernels`` are launched. Nothing waits for the GPU."""

import contextlib

import torch
import triton
from torch import Tensor

from merit_fast.kernels.sketch._triton_kernels import (
    add_kernel,
    ids_kernel,
    linear_kernel,
    rows_kernel,
)

BUCKET = 64 * 64
# By the shapes alone, not by the GPU's size, so that the order of sums is the same everywhere.
PROGRAMS = 1024
ADD_BLOCK = 1024


def sketch_rows(
    gradient: Tensor,
    offsets: Tensor,
    row_ids: Tensor | None,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    rows, columns = gradient.shape
    if not (rows and columns):
        return
    first_row, first_column, parameter_columns = place
    if row_ids is not None and scale is not None:
        gradient = (
            gradient.float()
        )  # triton 3.7.1 makes a tf32 product of scaled bf16 on sm_100, whatever is asked
    per_example = -(-rows // len(out))
    # Eight tiles, or 512 rows with ids, a program at least: it writes and reads 16 KiB of sums.
    work = (
        per_example // 512 if row_ids is not None else per_example * columns // (8 * out.shape[1])
    )
    across = -(-parameter_columns // 64)
    strides = gradient.stride(0), 0 if scale is None else scale.stride(0)
    part = (key, *strides, columns, first_row, first_column, across)
    inputs = (
        gradient,
        offsets,
        *(() if row_ids is None else (row_ids,)),
        out if scale is None else scale,
    )
    kernel, warps = (rows_kernel, 4) if row_ids is None else (ids_kernel, 8)
    _run(kernel, inputs, part, out, work, (scale is not None,), warps)


def sketch_linear(
    dy: Tensor,
    x: Tensor,
    offsets: Tensor,
    place: tuple[int, int, int],
    key: int,
    out: Tensor,
    scale: Tensor | None = None,
) -> None:
    shape = dy.shape[1], x.shape[1]
    if not (len(dy) and all(shape)):
        return
    if dy.dtype != x.dtype:
        dy, x = dy.float(), x.float()
    first_row, first_column, columns = place
    if vectors := first_row % 16 == 0 and first_column % 16 == 0:
        dy, x = _in_vectors(dy), _in_vectors(x)
    strides = dy.stride(0), x.stride(0), 0 if scale is None else scale.stride(0)
    part = (
        key,
        *strides,
        *shape,
        dy.shape[1],
        x.shape[1],
        first_row,
        first_column,
        -(-columns // 64),
    )
    work = shape[0] * shape[1] // (2 * out.shape[1])  # two tiles a program at least
    inputs = (dy, x, offsets, out if scale is None else scale)
    by_element = not vectors or (
        scale is not None and dy.dtype == torch.float32
    )  # wants the registers of 8 warps
    _run(
        linear_kernel, inputs, part, out, work, (scale is not None, vectors), 8 if by_element else 4
    )


def _in_vectors(values: Tensor) -> Tensor:
    """``values``, or a copy with columns of zeros (of the same tile), so that rows begin and end at 16 elements.

    Read and written once; the kernel reads them once for every 64 rows or columns of the other matrix.
    """
    rest = -values.shape[1] % 16
    aligned = values.stride(0) % 16 == 0 and values.data_ptr() % 16 == 0
    return values if aligned and not rest else torch.nn.functional.pad(values, (0, rest))


def _run(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor, ...],
    part: tuple[int, ...],
    out: Tensor,
    work: int,
    constants: tuple[bool, ...],
    warps: int,
) -> None:
    """Launches a kernel with as many splits as fill a GPU, but no more than ``work`` a bucket."""
    batch, proj_dim = out.shape
    buckets = proj_dim // BUCKET
    splits = max(1, min(PROGRAMS // (batch * buckets), work))
    with torch.cuda.device(out.device) if out.device.type == "cuda" else contextlib.nullcontext():
        sums = out if splits == 1 else out.new_empty(batch, splits, proj_dim)
        grid = (batch * splits * buckets,)
        kernel[grid](
            *inputs,
            sums,
            *part,
            buckets,
            splits,
            *constants,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if splits > 1:
            add_kernel[(out.numel() // ADD_BLOCK,)](
                sums, out, proj_dim, splits, ADD_BLOCK, num_warps=4
            )
