"""The custom ops: one step of many tensors of one kind, and the sum of their gradients' squares.

The backend is chosen when the op runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.optimizer import _eager
from merit_fast.kernels.optimizer._step import Step

# Codes of csrc/optimizer.h.
MOMENTS = (torch.float32, torch.bfloat16, torch.int8)
MASTERS = (None, torch.float32, torch.int16)


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
    """Updates the N tensors of a ``Step``, which has the same fields."""
    step = Step(
        weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages,
        clip, rates, keys, numbers, stochastic, zero_grad,
    )  # fmt: skip
    chosen = dispatch.choose("adamw", weights[0].device.type, backend)
    if chosen == "triton":
        from merit_fast.kernels.optimizer import _triton

        _triton.adamw(step)
    elif chosen == "cpu":
        lists = (weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages)
        factor = 1.0 if clip is None else float(clip)
        _native(lists, rates, keys, (*numbers, factor), stochastic, zero_grad)
    else:
        for k in range(len(step)):
            _eager.adamw(step, k)


def _native(
    lists: Sequence[Sequence[Tensor]],
    rates: Sequence[float],
    keys: Sequence[int],
    numbers: Sequence[float],
    stochastic: bool,
    zero_grad: bool,
) -> None:
    weights, grads, exp_avgs, exp_avg_sqs, scales, masters, averages = lists
    native = dispatch.native_module()
    assert native is not None
    count = len(weights)
    none = [0] * count
    places = [[t.data_ptr() for t in part] for part in (weights, grads, exp_avgs, exp_avg_sqs)]
    of_scales = [t.data_ptr() for t in scales] or none * 2
    rest = [[t.data_ptr() for t in part] or none for part in (masters, averages)]
    sizes, unsigned = (
        [weight.numel() for weight in weights],
        [key & 0xFFFFFFFFFFFFFFFF for key in keys],
    )
    rows = list(
        zip(sizes, *places, of_scales[:count], of_scales[count:], *rest, unsigned, strict=True)
    )
    kinds = (
        weights[0].dtype == torch.bfloat16,
        grads[0].dtype == torch.bfloat16,
        MOMENTS.index(exp_avgs[0].dtype),
        MASTERS.index(masters[0].dtype if masters else None),
        stochastic,
        zero_grad,
    )
    triples = list(zip(rates[0::3], rates[1::3], rates[2::3], strict=True))
    native.adamw(rows, triples, kinds, tuple(numbers), torch.get_num_threads())


@torch.library.custom_op("merit_fast::grad_square_sum", mutates_args=())
def grad_square_sum(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    """Float64 scalar: sum of squares of all elements of N dense tensors of one dtype."""
    chosen = dispatch.choose("adamw", grads[0].device.type, backend)
    if chosen == "cpu":
        native = dispatch.native_module()
        assert native is not None
        addresses, sizes = [grad.data_ptr() for grad in grads], [grad.numel() for grad in grads]
        bf16 = grads[0].dtype == torch.bfloat16
        return torch.tensor(
            native.square_sum(addresses, sizes, bf16, torch.get_num_threads()), dtype=torch.float64
        )
    if chosen == "triton":
        # torch's own kernel for many tensors makes no widened copies.
        norms = torch._foreach_norm(list(grads), 2, dtype=torch.float32)
        return torch.stack(norms).double().square().sum()
    return _eager.square_sum(grads)


@adamw.register_fake
def _(*arguments: object) -> None:
    return None


@grad_square_sum.register_fake
def _(grads: Sequence[Tensor], backend: str | None) -> Tensor:
    return grads[0].new_empty((), dtype=torch.float64)
