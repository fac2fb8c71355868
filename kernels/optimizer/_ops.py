"""The custom ops: one step of many tensors of one kind, and the sum of their gradients' squares.

The backend is chosen when the op runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import _eager, _native
from merit_fast.kernels.optimizer._step import Step


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
    firsts: Sequence[int],
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
    backend: str | None,
) -> Tensor:
    """Updates the N tensors of a ``Step``, which has the same fields.

    Returns [N] bool: whether some bf16 weight was not its float32 master rounded to nearest. Such
    a weight, written by someone else, becomes its master before the update.
    """
    step = Step(
        weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages,
        clip, rates, keys, firsts, numbers, stochastic, zero_grad,
    )  # fmt: skip
    chosen = dispatch.choose("adamw", weights[0].device.type, backend)
    if chosen == "triton":
        from merit_fast.kernels.optimizer import _triton

        return _triton.adamw(step)
    if chosen == "cpu":
        return _native.adamw(step)
    won = [_eager.adamw(step, k) for k in range(len(step))]
    return torch.tensor(won, dtype=torch.bool, device=weights[0].device)


@torch.library.custom_op("merit_fast::grad_square_sum", mutates_args=())
def grad_square_sum(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    """Float64 scalar: sum of squares of all elements of N dense tensors of one dtype."""
    chosen = dispatch.choose("adamw", grads[0].device.type, backend)
    if chosen == "cpu":
        return _native.square_sum(grads)
    if chosen == "triton":
        # torch's own kernel for many tensors makes no widened copies.
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
        return torch.stack(norms).double().square().sum()
    return _eager.square_sum(grads)


@adamw.register_fake
def _(weights: Sequence[Tensor], *arguments: object) -> Tensor:
    return weights[0].new_empty(len(weights), dtype=torch.bool)


@grad_square_sum.register_fake
def _(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)
