"""The layers in Triton: how the kernels of ``_triton_kernels`` are launched. The same functions as ``_native`` has.

liger-kernel has these layers too. Ours run in its place: they are checked against float64 to eager's own error, round
where the CPU's kernels round, read strided views, and run in Triton's interpreter, which liger's RMSNorm does not.
``bench.gpu`` times liger-kernel's beside them.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

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
PROGRAMS = 512  # that share the rows in a norm's backward; by the shapes alone, so that the order of sums is
HEADS = 8  # that a program turns


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
    given = [as_rows(t, out) for t in (x, x if residual is None else residual, normed, out)]
    tile_rows, block, warps = _tile(cols)
    if rows and cols:
        _launch(
            norm_kernel, -(-rows // tile_rows), out, *(t for t, _ in given), scale, rows, cols, *(s for _, s in given),
            epsilon, residual is not None, rounds, tile_rows, block, num_warps=warps,
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
    sums = (
        scale
        if dscale is None
        else torch.empty(programs, cols, dtype=torch.float32, device=dx.device)
    )
    given = [as_rows(t, dx) for t in (dout, dout if dtotal is None else dtotal, x, dx)]
    if rows and cols:
        _launch(
            norm_backward_kernel, programs, dx, *(t for t, _ in given), scale, sums, rows, cols,
            *(s for _, s in given), epsilon, steps, dtotal is not None, dscale is not None, tile_rows, block,
            num_warps=warps,
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
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_out: Tensor, k_out: Tensor, backward: bool
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
    q_tiles, tiles = -(-q_heads // HEADS), -(-q_heads // HEADS) + -(-k.shape[1] // HEADS)
    if batch * tokens * tiles:
        _launch(
            rope_kernel, batch * tokens * tiles, q, q, k, cos, sin, q_out, k_out, tokens, q_heads, k.shape[1], q_tiles,
            tiles, half, width, *strides, *positions, backward, HEADS, triton.next_power_of_2(max(half, 1)), rest,
            num_warps=4,
        )  # fmt: skip


def _launch_gated(kernel: Any, out: Tensor, tensors: tuple[Tensor, ...], activation: str) -> None:
    given = [as_rows(t, out) for t in tensors]
    rows, cols = _sizes(out)
    if all(stride == cols for _, stride in given):
        rows, cols = 1, rows * cols
    across = -(-cols // PIECE)
    if rows * across:
        _launch(
            kernel, rows * across, out, *(t for t, _ in given), cols, *(s for _, s in given), across, activation, PIECE,
            num_warps=4,
        )  # fmt: skip


def _launch(kernel: Any, programs: int, device_of: Tensor, *arguments: Any, num_warps: int) -> None:
    on_gpu = device_of.device.type == "cuda"
    with torch.cuda.device(device_of.device) if on_gpu else contextlib.nullcontext():
        kernel[(programs,)](*arguments, num_warps=num_warps, enable_fp_fusion=True)


def _sizes(x: Tensor) -> tuple[int, int]:
    cols = x.shape[-1]
    return (x.numel() // cols if cols else 0), cols


def _tile(cols: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 elements a thread at most, so that none are spilled."""
    block = triton.next_power_of_2(max(cols, 1))
    rows = max(1, TILE // block)
    return rows, block, min(32, max(4, rows * block // 512))
