"""The custom ops: a step of many tensors of one kind at once, and the sum of their gradients' squares.

All tensors of a call share a device and their kinds of weight, gradient, moments and master. Each is dense, and all of
a parameter have its layout: elements are taken in the order of memory. The backend is chosen here, when the op runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import _eager, _native


@torch.library.custom_op(
    "merit_fast::adamw",
    mutates_args={"weights", "grads", "exp_avgs", "exp_avg_sqs", "scales", "masters", "averages"},
)
def adamw(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    scales: Sequence[Tensor],
    masters: Sequence[Tensor],
    averages: Sequence[Tensor],
    clip: Tensor | None,
    rates: Sequence[float],
    keys: Sequence[int],
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
    backend: str | None,
) -> None:
    """One step of N tensors.

    ``scales``: N of the first moments, then N of the second, if these are 8-bit; ``masters``, ``averages``: N or none;
    ``clip``: what gradients are multiplied with, a float32 scalar on their device; ``rates``: for each tensor
    lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t) and the new weight's share in the average; ``keys``: of (seed, step,
    parameter), for stochastic rounding; ``numbers``: 1 - lr * weight_decay, beta1, beta2, epsilon.
    """
    chosen = dispatch.choose("adamw", weights[0].device.type, backend)
    lists = (weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages)
    if chosen == "triton":
        from merit_fast.kernels.optimizer import _triton

        _triton.adamw(*lists, clip, rates, keys, numbers, stochastic, zero_grad)
    elif chosen == "cpu":
        factor = 1.0 if clip is None else float(clip)
        _native.adamw(lists, factor, rates, keys, numbers, stochastic, zero_grad)
    else:
        for k in range(len(weights)):
            weight, grad, exp_avg, exp_avg_sq = (flat(part[k]) for part in lists[:4])
            scale = scales[k :: len(weights)]
            master, average = (flat(part[k]) if part else None for part in (masters, averages))
            _eager.adamw(
                weight, grad, exp_avg, exp_avg_sq, scale, master, average, clip,
                rates[3 * k : 3 * k + 3], keys[k], numbers, stochastic, zero_grad,
            )  # fmt: skip


@torch.library.custom_op("merit_fast::grad_square_sum", mutates_args=())
def grad_square_sum(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    """Float64 scalar: the sum of squares of all elements of N dense tensors of one dtype."""
    chosen = dispatch.choose("adamw", grads[0].device.type, backend)
    if chosen == "cpu":
        return _native.square_sum(grads)
    if chosen == "triton":  # torch's own kernel for many tensors; no widened copies
        return (
            torch.stack(torch._foreach_norm(list(grads), 2, dtype=torch.float32))
            .double()
            .square()
            .sum()
        )
    return _eager.square_sum(grads)


@adamw.register_fake
def _(*arguments: object) -> None:
    return None


@grad_square_sum.register_fake
def _(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of memory, as a view."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))
