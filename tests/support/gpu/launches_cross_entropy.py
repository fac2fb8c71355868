"""The launches of linear + cross-entropy's Triton kernels for a tile of logits, for the gate."""

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.cross_entropy import _triton, _triton_kernels

ROWS = 64
COLUMNS = 8192
BF16 = torch.bfloat16
F32 = torch.float32


def launches() -> list[GpuLaunch]:
    cases = [(BF16, False, False), (BF16, True, True), (F32, False, False), (F32, True, True)]
    return [make(*case) for make in (update, gradient) for case in cases]


def update(dtype: torch.dtype, bias: bool, cap: bool) -> GpuLaunch:
    state = torch.zeros(4, ROWS, dtype=torch.float64)
    arguments = (*tile(dtype), state, ROWS, COLUMNS, 0, 30.0, bias, cap, _triton.UPDATE_BLOCK)
    return GpuLaunch(
        named("log-sum-exp of a tile", dtype, bias),
        _triton_kernels.update_kernel,
        arguments,
        {"num_warps": 8},
    )


def gradient(dtype: torch.dtype, bias: bool, cap: bool) -> GpuLaunch:
    logits, *rest = tile(dtype)
    arguments = (
        logits,
        *rest,
        torch.zeros(4, ROWS),
        logits,
        ROWS,
        COLUMNS,
        0,
        30.0,
        bias,
        cap,
        _triton.GRADIENT_BLOCK,
    )
    return GpuLaunch(
        named("gradient of a tile", dtype, bias),
        _triton_kernels.gradient_kernel,
        arguments,
        {"num_warps": 4},
    )


def tile(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(ROWS, COLUMNS, dtype=dtype),
        torch.zeros(COLUMNS),
        torch.zeros(ROWS, dtype=torch.int64),
    )


def named(what: str, dtype: torch.dtype, bias: bool) -> str:
    return f"{what}, {'bf16' if dtype == BF16 else 'fp32'}{', bias and softcap' if bias else ''}"
