"""Launches AdamW's Triton kernel: one launch for all tensors of a step.

The table holds rows of N numbers: first blocks, sizes, the addresses of weights, gradients,
moments, their scales, masters and averages (0: none), keys, three float32 as bits (step size,
root, share in the average), the index of the first element in the whole parameter, and the address
of the byte that says whether a weight won over its master.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import _tables
from merit_fast.kernels.optimizer._step import Step
from merit_fast.kernels.optimizer._triton_kernels import adamw_kernel

ROWS = 4  # of one program
WIDTH = 256  # elements of a row, which is a block of 8-bit moments
BLOCK = ROWS * WIDTH
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
# Codes in ``KINDS``: moments and masters as in csrc/optimizer/optimizer.h.
MOMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MASTERS = {torch.float32: 1, torch.int16: 2, torch.int8: 3}

Kinds = tuple[int | bool, ...]


def adamw(step: Step) -> Tensor:
    """Updates every tensor of a step. Returns whether a weight of each won over its master."""
    weight = step.weights[0]
    won = torch.zeros(len(step), dtype=torch.bool, device=weight.device)
    table, kinds, blocks = describe(step, won)
    if not blocks:
        return won
    table = _tables.on_device_of(weight, table)
    decay, beta1, beta2, epsilon = step.numbers
    scalars = (decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, epsilon)
    clip = table if step.clip is None else step.clip
    arguments = (table, len(step), clip, *scalars, kinds, ROWS, WIDTH)
    _tables.launch(adamw_kernel, blocks, weight, arguments, OPTIONS)
    return won


def describe(step: Step, won: Tensor) -> tuple[Tensor, Kinds, int]:
    """The table on the CPU, the kinds that the compiler must know, and the number of blocks."""
    sizes = [weight.numel() for weight in step.weights]
    starts, blocks = _tables.first_blocks(sizes, BLOCK)
    count = len(step)
    scales = _addresses(step.scales, 2 * count)
    lists = (step.weights, step.grads, step.exp_avgs, step.exp_avg_sqs, step.masters, step.averages)
    *tensors, masters, averages = [_addresses(each, count) for each in lists]
    elements = [*tensors, masters, averages]
    aligned = all(address % 16 == 0 for addresses in elements for address in addresses)
    rates = [_tables.single_bits(step.rates[k::3]) for k in range(3)]
    rows = [
        starts,
        sizes,
        *tensors,
        scales[:count],
        scales[count:],
        masters,
        averages,
        list(step.keys),
        *rates,
        list(step.firsts),
        [won.data_ptr() + k for k in range(count)],
    ]
    return _tables.table_of(rows), _kinds(step, aligned), blocks


def _addresses(tensors: Sequence[Tensor], count: int) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors] or [0] * count


def _kinds(step: Step, aligned: bool) -> Kinds:
    return (
        aligned,
        step.weights[0].dtype == torch.bfloat16,
        step.grads[0].dtype == torch.bfloat16,
        MOMENTS[step.exp_avgs[0].dtype],
        MASTERS[step.masters[0].dtype] if step.masters else 0,
        bool(step.averages),
        step.stochastic,
        step.zero_grad,
        step.clip is not None,
    )
