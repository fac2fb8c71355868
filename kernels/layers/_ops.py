"""The custom ops with their gradients, and a shorter way to both outside of the compiler.

A custom op's own Python costs more than a small layer's arithmetic. So where nobody looks at operators (no compiler, no
dispatch mode, plain tensors), an autograd function calls the kernels themselves.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from merit_fast.kernels.layers import _run
from merit_fast.kernels.layers._layout import heads_inside


def _differentiable(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """The ops merit_fast::NAME of ``forward`` and ``backward``; the function returned takes the short way if it may.

    ``save(ctx, inputs, output)`` keeps what ``gradients(ctx, backward, *gradients of the outputs)`` needs.
    """
    op, backward_op = _custom_op(forward), _custom_op(backward)
    op.register_autograd(
        lambda ctx, *given: gradients(ctx, backward_op, *given), setup_context=save
    )

    def direct_forward(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        save(ctx, inputs, output)
        return output

    def direct_backward(ctx: Any, *given: Tensor | None) -> Any:
        return gradients(ctx, backward if _is_unwatched(given) else backward_op, *given)

    def transformed_backward(ctx: Any, *given: Tensor | None) -> Any:
        return gradients(ctx, backward_op, *given)

    # torch.func asks for setup_context, at 80 us a call, and custom ops do not have it.
    direct = _function(forward=direct_forward, backward=direct_backward)
    transformed = _function(forward=forward, setup_context=save, backward=transformed_backward)

    def run(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return direct.apply(*arguments) if _is_unwatched(arguments) else op(*arguments)

    return run


def _function(backward: Callable[..., Any], **members: Callable[..., Any]) -> Any:
    members = {**members, "backward": once_differentiable(backward)}
    return type(
        "Layer", (torch.autograd.Function,), {name: staticmethod(f) for name, f in members.items()}
    )


@functools.cache
def _custom_op(function: Callable[..., Any]) -> Any:
    """The last argument of all is the backend."""
    op = torch.library.custom_op(f"merit_fast::{function.__name__}", function, mutates_args=())
    op.register_fake(lambda *arguments: function(*arguments[:-1], "none"))
    return op


def _is_unwatched(arguments: tuple[Any, ...]) -> bool:
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    for argument in arguments:
        if (
            isinstance(argument, Tensor)
            and type(argument) is not Tensor
            and type(argument) is not Parameter
        ):
            return False
    return True


def _save_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.epsilon, ctx.offset, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, backward: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return (*_gradients_of_norm(ctx, backward, dout, None, 1), None, None, None, None)


def _save_added_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, residual, weight, ctx.epsilon, ctx.offset, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, residual.dtype
    ctx.save_for_backward(output[1], weight)


def _added_norm_gradients(
    ctx: Any, backward: Any, dout: Tensor | None, dtotal: Tensor | None
) -> tuple[Tensor | None, ...]:
    given, dweight = dtotal, None
    if dout is not None:
        given, dweight = _gradients_of_norm(ctx, backward, dout, dtotal, 2)
    dx, dresidual = (None if given is None else given.to(dtype) for dtype in ctx.dtypes)
    return dx, dresidual, dweight, None, None, None, None


def _gradients_of_norm(
    ctx: Any, backward: Any, dout: Tensor, dtotal: Tensor | None, place: int
) -> tuple[Tensor, Tensor | None]:
    """``place``: of the weight among the inputs."""
    x, weight = ctx.saved_tensors
    wants = weight is not None and ctx.needs_input_grad[place]
    dx, dweight = backward(dout, dtotal, x, weight, ctx.epsilon, ctx.offset, wants, ctx.backend)
    return dx, dweight if wants else None


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _gated_gradients(ctx: Any, backward: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend), None, None)


def _packed_gradients(ctx: Any, backward: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return backward(dout, *ctx.saved_tensors, ctx.activation, ctx.backend), None, None


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, cos, sin, ctx.backend = inputs
    ctx.dtype, ctx.inside = q.dtype, (heads_inside(q), heads_inside(k))
    ctx.save_for_backward(cos, sin)


def _rope_gradients(ctx: Any, backward: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return (
        *backward(dq, dk, *ctx.saved_tensors, ctx.dtype, *ctx.inside, ctx.backend),
        None,
        None,
        None,
    )


rms_norm = _differentiable(_run.rms_norm, _run.rms_norm_backward, _save_norm, _norm_gradients)
add_rms_norm = _differentiable(
    _run.add_rms_norm, _run.rms_norm_backward, _save_added_norm, _added_norm_gradients
)
gated = _differentiable(_run.gated, _run.gated_backward, _save_gated, _gated_gradients)
gated_packed = _differentiable(
    _run.gated_packed, _run.gated_packed_backward, _save_gated, _packed_gradients
)
rope = _differentiable(_run.rope, _run.rope_backward, _save_rope, _rope_gradients)
