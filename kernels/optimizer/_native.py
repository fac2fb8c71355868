"""The optimizer's calls of merit_fast._C: tensors become columns of addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import dispatch

# Codes of csrc/optimizer/optimizer.h.
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)
MASTERS = (None, torch.float32, torch.int16)


def adamw(
    lists: Sequence[Sequence[Tensor]],
    clip: float,
    rates: Sequence[float],
    keys: Sequence[int],
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
) -> None:
    """Take one step; arguments as in ``_ops.adamw``, whose lists of tensors come in order."""
    native = dispatch.native()
    weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages = lists
    decay, beta1, beta2, epsilon = numbers
    count = len(weights)
    tensors = native.AdamWTensors(
        sizes=[weight.numel() for weight in weights],
        weights=_addresses(weights),
        grads=_addresses(grads),
        exp_avgs=_addresses(exp_avgs),
        exp_avg_sqs=_addresses(exp_avg_sqs),
        exp_avg_scales=_addresses(scales[:count]),
        exp_avg_sq_scales=_addresses(scales[count:]),
        masters=_addresses(masters),
        averages=_addresses(averages),
        keys=[key & 0xFFFFFFFFFFFFFFFF for key in keys],
        rates=rates[0::3],
        roots=rates[1::3],
        average_weights=rates[2::3],
    )
    native.adamw(
        tensors=tensors,
        weight_bf16=weights[0].dtype == torch.bfloat16,
        grad_bf16=grads[0].dtype == torch.bfloat16,
        moments=MOMENTS.index(exp_avgs[0].dtype),
        master=MASTERS.index(masters[0].dtype if masters else None),
        stochastic=stochastic,
        zero_grad=zero_grad,
        decay=decay,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        clip=clip,
        threads=torch.get_num_threads(),
    )


def square_sum(grads: Sequence[Tensor]) -> Tensor:
    """Float64 scalar: the sum of squares of all elements."""
    total = dispatch.native().square_sum(
        data=_addresses(grads),
        sizes=[grad.numel() for grad in grads],
        bf16=grads[0].dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
    )
    return torch.tensor(total, dtype=torch.float64)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
