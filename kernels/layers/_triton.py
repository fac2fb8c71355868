"""Launches the layers' Triton kernels, in functions named as those of ``_native``.

liger-kernel has these layers too. Ours run instead: tests hold them to eager's own error against
float64, they round where the CPU's kernels round, read strided views, and run in Triton's
interpreter, in which liger's RMSNorm does not run. ``bench.gpu`` times both.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from merit_fast.kernels._devices import device_of
from merit_fast.kernels.layers._layout import as_rows, dense_rows
from merit_fast.kernels.layers._triton_kernels import (
    gated_backward_kernel,
    gated_kernel,
    norm_backward_kernel,
    norm_kernel,
    rope_kernel,
)

PIECE = 1024  # elements of a program of the gated activations
TILE = 2048  # elements of a program of the norms: several short rows, or one long one
PROGRAMS = 512  # most programs of a norm's backward; no GPU changes it, nor the order of sums
HEADS = 8  # heads of one program


def norm(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    scale: Tensor,
    epsilon: float,
    rounds: bool,
) -> None:
    rows, cols = _sizes(out)
    normed = x if total is None else total
    rows_of = [as_rows(t, out) for t in (x, x if residual is None else residual, normed, out)]
    tile_rows, block, warps = _tile(cols)
    if rows and cols:
        _launch(
            norm_kernel, -(-rows // tile_rows), out, *(t for t, _ in rows_of), scale, rows, cols,
            *(stride for _, stride in rows_of), epsilon, residual is not None, rounds,
            tile_rows, block, num_warps=warps,
        )  # fmt: skip


def norm_backward(
    dout: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    dx: Tensor,
    scale: Tensor,
    epsilon: float,
    dscale: Tensor | None,
) -> None:
    rows, cols = _sizes(dx)
    tile_rows, block, warps = _tile(cols)
    tiles = -(-rows // tile_rows)
    steps = max(1, -(-tiles // PROGRAMS))
    programs = -(-tiles // steps)
    sums = scale  # not touched
    if dscale is not None:
        sums = torch.empty(programs, cols, dtype=torch.float32, device=dx.device)
    rows_of = [as_rows(t, dx) for t in (dout, dout if dtotal is None else dtotal, x, dx)]
    if rows and cols:
        _launch(
            norm_backward_kernel, programs, dx, *(t for t, _ in rows_of), scale, sums, rows, cols,
            *(stride for _, stride in rows_of), epsilon, steps, dtotal is not None,
            dscale is not None, tile_rows, block, num_warps=warps,
        )  # fmt: skip
    if dscale is not None:
        torch.sum(sums, 0, out=dscale)


def gated(gate: Tensor, up: Tensor, out: Tensor, activation: str) -> None:
    _launch_gated(gated_kernel, out, (gate, up, out), activation)


def gated_backward(
    dout: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, activation: str
) -> None:
    _launch_gated(gated_backward_kernel, dgate, (dout, gate, up, dgate, dup), activation)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    interleaved: bool,
    backward: bool,
) -> None:
    q, k, cos, sin = (dense_rows(x) for x in (q, k, cos, sin))
    batch, q_heads, tokens, width = q.shape
    half = cos.shape[-1] // 2
    strides = [
        stride for x in (q, k, q_out, k_out) for stride in (x.stride(0), x.stride(1), x.stride(2))
    ]
    positions = [
        stride for x in (cos, sin) for stride in (x.stride(0) if len(x) > 1 else 0, x.stride(1))
    ]
    rest = triton.next_power_of_2(width - 2 * half) if width > 2 * half else 0
    q_tiles = -(-q_heads // HEADS)
    tiles = q_tiles + -(-k.shape[1] // HEADS)
    if batch * tokens * tiles:
        _launch(
            rope_kernel, batch * tokens * tiles, q, q, k, cos, sin, q_out, k_out,
            tokens, q_heads, k.shape[1], q_tiles, tiles, half, width, *strides, *positions,
            interleaved, backward, HEADS, triton.next_power_of_2(max(half, 1)), rest, num_warps=4,
        )  # fmt: skip


def _launch_gated(kernel: Any, out: Tensor, tensors: tuple[Tensor, ...], activation: str) -> None:
    rows_of = [as_rows(t, out) for t in tensors]
    rows, cols = _sizes(out)
    if all(stride == cols for _, stride in rows_of):
        cols *= rows
        rows = 1
    across = -(-cols // PIECE)
    if rows * across:
        _launch(
            kernel, rows * across, out, *(t for t, _ in rows_of), cols,
            *(stride for _, stride in rows_of), across, activation, PIECE, num_warps=4,
        )  # fmt: skip


def _launch(kernel: Any, programs: int, out: Tensor, *arguments: Any, num_warps: int) -> None:
    with device_of(out):
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True)


def _sizes(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


def _tile(cols: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: no thread has more than 16 elements."""
    block = triton.next_power_of_2(max(cols, 1))
    rows = max(1, TILE // block)
    return rows, block, min(32, max(4, rows * block // 512))
