"""The launches of AdamW's Triton kernel, for the gate and the tests of its code."""

import torch
from support.gpu.code import GpuLaunch

from merit_fast.kernels.optimizer import _triton, _triton_kernels
from merit_fast.kernels.optimizer._step import Step

BF16 = torch.bfloat16
F32 = torch.float32
FULL = (True, True, True)


def launches() -> list[GpuLaunch]:
    return [
        launch("AdamW, fp32", F32),
        launch("AdamW, fp32, off the 16-byte grid", F32, shift=1),
        launch("AdamW, bf16", BF16),
        launch(
            "AdamW, fp32, clip, average, zeroed gradient",
            F32,
            average=True,
            flags=(False, True, True),
        ),
        launch("AdamW, bf16, stochastic, bf16 moments", BF16, BF16),
        launch("AdamW, bf16, stochastic, 8-bit moments", BF16, torch.int8),
        launch("AdamW, bf16, fp32 master", BF16, master=F32),
        launch(
            "AdamW, bf16, split master, all at once",
            BF16,
            torch.int8,
            torch.int16,
            average=True,
            flags=FULL,
        ),
        launch("AdamW, bf16, 8-bit remainders and moments", BF16, torch.int8, torch.int8),
        launch("AdamW, bf16, off the 16-byte grid", BF16, shift=1),
    ]


def launch(
    name: str,
    dtype: torch.dtype,
    moments: torch.dtype = F32,
    master: torch.dtype | None = None,
    average: bool = False,
    flags: tuple[bool, bool, bool] = (True, False, False),
    shift: int = 0,
) -> GpuLaunch:
    """One tensor's step; ``flags``: stochastic, zero_grad, clipped."""

    def tensors(kind: torch.dtype, count: int = 3000) -> list[torch.Tensor]:
        return [torch.zeros(count + shift, dtype=kind)[shift:]]

    second = torch.uint8 if moments == torch.int8 else moments
    stochastic, zero_grad, clipped = flags
    step = Step(
        weights=tensors(dtype),
        grads=tensors(dtype),
        exp_avgs=tensors(moments),
        exp_avg_sqs=tensors(second),
        scales=tensors(F32, 12) * 2 if moments == torch.int8 else [],
        masters=tensors(master) if master else [],
        averages=tensors(F32) if average else [],
        clip=torch.ones(()) if clipped else None,
        rates=[1e-3, 1.0, 0.1],
        keys=[5],
        firsts=[0],
        numbers=[0.999, 0.9, 0.999, 1e-8],
        stochastic=stochastic,
        zero_grad=zero_grad,
    )
    table, kinds, _ = _triton.describe(step, torch.zeros(1, dtype=torch.bool))
    scalars = (0.999, 0.9, 0.1, 0.999, 0.001, 1e-8)
    arguments = (
        table,
        1,
        step.clip if clipped else table,
        *scalars,
        kinds,
        _triton.ROWS,
        _triton.WIDTH,
    )
    return GpuLaunch(name, _triton_kernels.adamw_kernel, arguments, _triton.OPTIONS)
