"""The launches of linear + cross-entropy's Triton kernels for a tile of logits, for the gate."""

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.cross_entropy import _triton, _triton_kernels

ROWS = 64
COLUMNS = 8192
BF16 = torch.bfloat16
F32 = torch.float32
FACTORS = (0.5, 30.0, 2.0)  # scale, softcap, 1 / temperature


def launches() -> list[GpuLaunch]:
    cases = [(BF16, False, False), (BF16, True, False), (F32, False, False), (F32, True, False)]
    cases += [(BF16, False, True), (F32, True, True)]
    return [make(*case) for make in (update, gradient) for case in cases]


def update(dtype: torch.dtype, form: bool, statistics: bool) -> GpuLaunch:
    """``form``: with bias and softcap; ``statistics``: also entropy and top-1."""
    state = torch.zeros(6 if statistics else 4, ROWS, dtype=torch.float64)
    numbers = (ROWS, COLUMNS, 0, *FACTORS)
    arguments = (*tile(dtype), state, *numbers, form, form, statistics, _triton.UPDATE_BLOCK)
    name = "statistics of a tile" if statistics else "log-sum-exp of a tile"
    return GpuLaunch(
        named(name, dtype, form),
        _triton_kernels.update_kernel,
        arguments,
        {"num_warps": 8},
    )


def gradient(dtype: torch.dtype, form: bool, statistics: bool) -> GpuLaunch:
    logits, *rest = tile(dtype)
    name = "gradient of a tile's statistics" if statistics else "gradient of a tile"
    arguments = (
        logits,
        *rest,
        torch.zeros(5 if statistics else 4, ROWS),
        logits,
        ROWS,
        COLUMNS,
        0,
        *FACTORS,
        form,
        form,
        statistics,
        _triton.GRADIENT_BLOCK,
    )
    return GpuLaunch(
        named(name, dtype, form),
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


def named(what: str, dtype: torch.dtype, form: bool) -> str:
    return f"{what}, {'bf16' if dtype == BF16 else 'fp32'}{', bias and softcap' if form else ''}"
