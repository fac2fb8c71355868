"""Custom ops under torch.func: gradients and vmap of ops that read tensors' memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def differentiable(
    op: Any, save: Callable[..., None], gradients: Callable[..., Any]
) -> Callable[..., Any]:
    """Makes a custom op differentiable; returns the function to call in its place.

    torch.func.grad asks for an autograd function with setup_context, which a custom op lacks.
    """
    op.register_autograd(gradients, setup_context=save)
    members: dict[str, Any] = {
        "forward": staticmethod(op),
        "setup_context": staticmethod(save),
        "backward": staticmethod(once_differentiable(gradients)),
        "generate_vmap_rule": True,
    }
    transformed: Any = type("Transformed", (torch.autograd.Function,), members)

    def run(*arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return op(*arguments)

    return run


def loop_over_batch(op: Any) -> None:
    """Gives a custom op of tensor results its vmap: one call for each element of the batch."""

    def in_turn(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = []
        for index in range(info.batch_size):
            element = [
                _element(argument, axis, index)
                for argument, axis in zip(arguments, in_dims, strict=True)
            ]
            results.append(op(*element))
        stacked = tuple(torch.stack(values) for values in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    op.register_vmap(in_turn)


def _element(argument: Any, axis: Any, index: int) -> Any:
    if isinstance(argument, Tensor) and axis is not None:
        return argument.select(axis, index)
    return argument
