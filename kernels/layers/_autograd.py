"""Differentiable custom ops of two functions, which are called directly outside of the compiler.

A custom op's Python code costs more than a small layer's arithmetic. So where nothing looks at
operators (no compiler, no dispatch mode, plain tensors), an autograd function calls the kernels
directly.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from merit_fast.kernels._functorch import call_by_entry, entry_by_entry, refuse_tangents, tags


def differentiable(
    backward: Callable[..., Any],
    save: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the ops merit_fast::NAME of the decorated forward function and of ``backward``.

    ``save(ctx, inputs, output)`` keeps what the gradients need; ``gradients(ctx, backward, *output
    gradients)`` returns them. The last argument of both functions is the backend.
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        op = _custom_op(forward)
        backward_op = _custom_op(backward)
        op.register_autograd(
            lambda ctx, *douts: gradients(ctx, backward_op, *douts), setup_context=save
        )

        def direct_forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        def direct_backward(ctx: Any, *douts: Tensor | None) -> Any:
            return gradients(ctx, backward if _is_unwatched(douts) else backward_op, *douts)

        def transformed_backward(ctx: Any, *douts: Tensor | None) -> Any:
            return gradients(ctx, backward_op, *douts)

        # torch.func asks for setup_context, which costs 80 us a call and which custom ops do not
        # have.
        direct = _function(forward=direct_forward, backward=direct_backward)
        transformed = _function(
            forward=forward,
            setup_context=save,
            backward=transformed_backward,
            vmap=lambda *arguments: call_by_entry(transformed.apply, *arguments),
        )

        def run(*arguments: Any) -> Any:
            refuse_tangents(forward.__name__, arguments)
            if torch._C._are_functorch_transforms_active():
                return transformed.apply(*arguments)
            return direct.apply(*arguments) if _is_unwatched(arguments) else op(*arguments)

        return run

    return decorate


def _function(backward: Callable[..., Any], **members: Callable[..., Any]) -> Any:
    members = {**members, "backward": once_differentiable(backward)}
    return type(
        "Layer", (torch.autograd.Function,), {name: staticmethod(f) for name, f in members.items()}
    )


@functools.cache
def _custom_op(function: Callable[..., Any]) -> Any:
    # Fakes tell strides, so a compiler must hand over those that it traced. No op reads a value on
    # the host: none is cudagraph_unsafe.
    op = torch.library.custom_op(
        f"merit_fast::{function.__name__}",
        function,
        mutates_args=(),
        tags=tags("needs_exact_strides"),
    )
    op.register_fake(lambda *arguments: function(*arguments[:-1], "none"))
    entry_by_entry(op)
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
