"""Launches the CountSketch's Triton kernels. Nothing waits for the GPU."""

import torch
import triton
from torch import Tensor

from merit_fast.kernels._devices import device_of
from merit_fast.kernels.sketch._target import BUCKET, SketchTarget
from merit_fast.kernels.sketch._triton_kernels import (
    add_kernel,
    ids_kernel,
    linear_kernel,
    rows_kernel,
)

# Most programs of a launch. They depend only on the shapes, and so does the order of sums.
PROGRAMS = 1024
ADD_BLOCK = 1024


def sketch_rows(gradient: Tensor, row_ids: Tensor | None, target: SketchTarget) -> None:
    """Adds the sketch of each example's rows; ``row_ids``: their rows in the parameter."""
    rows, columns = gradient.shape
    if not (rows and columns):
        return
    out = target.out
    scale = target.scale
    if row_ids is not None and scale is not None:
        # triton 3.7.1 makes a tf32 product of scaled bf16 on sm_100, whatever precision is asked
        # for.
        gradient = gradient.float()
    # A program takes at least eight tiles, or 512 rows by id: it writes and reads 16 KiB of sums.
    per_example = -(-rows // target.examples)
    if row_ids is None:
        work = per_example * columns // (8 * target.proj_dim)
        tensors: tuple[Tensor, ...] = (gradient, target.offsets)
    else:
        work = per_example // 512
        tensors = (gradient, target.offsets, row_ids)
    numbers = (
        target.key,
        gradient.stride(0),
        0 if scale is None else scale.stride(0),
        columns,
        *_place(target),
    )
    kernel = rows_kernel if row_ids is None else ids_kernel
    warps = 4 if row_ids is None and scale is None else 8
    inputs = (*tensors, out if scale is None else scale)
    _run(kernel, inputs, numbers, target, work, (scale is not None,), warps)


def sketch_linear(dy: Tensor, x: Tensor, target: SketchTarget) -> None:
    """Adds the sketch of dy^T x of each example."""
    rows = dy.shape[1]
    columns = x.shape[1]
    if not (len(dy) and rows and columns):
        return
    if dy.dtype != x.dtype:
        dy = dy.float()
        x = x.float()
    out = target.out
    scale = target.scale
    vectors = target.first_row % 16 == 0 and target.first_column % 16 == 0
    if vectors:
        dy = _in_vectors(dy)
        x = _in_vectors(x)
    numbers = (
        target.key,
        dy.stride(0),
        x.stride(0),
        0 if scale is None else scale.stride(0),
        rows,
        columns,
        dy.shape[1],
        x.shape[1],
        *_place(target),
    )
    work = rows * columns // (2 * target.proj_dim)  # two tiles a program at least
    inputs = (dy, x, target.offsets, out if scale is None else scale)
    # Loads by element take the registers of 8 warps.
    by_element = not vectors or (scale is not None and dy.dtype == torch.float32)
    warps = 8 if by_element else 4
    _run(linear_kernel, inputs, numbers, target, work, (scale is not None, vectors), warps)


def _place(target: SketchTarget) -> tuple[int, int, int]:
    """First row, first column, and tiles across the parameter."""
    return target.first_row, target.first_column, -(-target.columns // 64)


def _in_vectors(values: Tensor) -> Tensor:
    """``values``, or a copy with columns of zeros so that rows begin and end at 16 elements.

    A copy reads and writes them once; the kernel reads them once for every 64 rows or columns of
    the other matrix.
    """
    rest = -values.shape[1] % 16
    aligned = values.stride(0) % 16 == 0 and values.data_ptr() % 16 == 0
    return values if aligned and not rest else torch.nn.functional.pad(values, (0, rest))


def _run(
    kernel: triton.JITFunction,
    inputs: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    target: SketchTarget,
    work: int,
    constants: tuple[bool, ...],
    warps: int,
) -> None:
    """Launches a kernel with as many splits as fill a GPU, but no more than ``work`` a bucket."""
    out = target.out
    batch, proj_dim = out.shape
    buckets = proj_dim // BUCKET
    splits = max(1, min(PROGRAMS // (batch * buckets), work))
    with device_of(out):
        sums = out if splits == 1 else out.new_empty(batch, splits, proj_dim)
        grid = (batch * splits * buckets,)
        kernel[grid](
            *inputs,
            sums,
            *numbers,
            *target.group,
            splits,
            *constants,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if splits > 1:
            add_kernel[(out.numel() // ADD_BLOCK,)](
                sums, out, proj_dim, splits, ADD_BLOCK, num_warps=4
            )
