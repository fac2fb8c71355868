"""The optimizer's calls of merit_fast._C: tensors become columns of addresses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer._step import Step

# Codes of csrc/optimizer/optimizer.h.
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)
MASTERS = (None, torch.float32, torch.int16, torch.int8)


def adamw(step: Step) -> Tensor:
    """Updates the tensors of ``step``. Returns whether a weight of each won over its master."""
    native = dispatch.native()
    count = len(step)
    tensors = native.AdamWTensors(
        sizes=[weight.numel() for weight in step.weights],
        weights=_addresses(step.weights),
        grads=_addresses(step.grads),
        exp_avgs=_addresses(step.exp_avgs),
        exp_avg_sqs=_addresses(step.exp_avg_sqs),
        exp_avg_scales=_addresses(step.scales[:count]),
        exp_avg_sq_scales=_addresses(step.scales[count:]),
        masters=_addresses(step.masters),
        averages=_addresses(step.averages),
        keys=[key & 0xFFFFFFFFFFFFFFFF for key in step.keys],
        firsts=list(step.firsts),
        rates=step.rates[0::3],
        roots=step.rates[1::3],
        average_weights=step.rates[2::3],
    )
    decay, beta1, beta2, epsilon = step.numbers
    won = native.adamw(
        tensors=tensors,
        weight_bf16=step.weights[0].dtype == torch.bfloat16,
        grad_bf16=step.grads[0].dtype == torch.bfloat16,
        moments=MOMENTS.index(step.exp_avgs[0].dtype),
        master=MASTERS.index(step.masters[0].dtype if step.masters else None),
        stochastic=step.stochastic,
        zero_grad=step.zero_grad,
        decay=decay,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        clip=1.0 if step.clip is None else float(step.clip),
        threads=torch.get_num_threads(),
    )
    return torch.tensor(won, dtype=torch.bool)


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
