"""Custom ops under torch.func: gradients and vmap of ops that read tensors' memory."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
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
        refuse_tangents(op._name, arguments)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return op(*arguments)

    return run


def refuse_tangents(op: str, arguments: tuple[Any, ...]) -> None:
    """Refuses forward-mode derivatives, which a custom op would leave out of its results.

    Raises:
        NotImplementedError: a tensor has a tangent, by torch.func.jvp or in a dual level.
    """
    if forward_ad._current_level < 0:
        return
    unpack: Any = forward_ad.unpack_dual
    for x in arguments:
        if isinstance(x, Tensor) and unpack(x).tangent is not None:
            raise NotImplementedError(
                f"{op}: kernels have no forward-mode derivatives (torch.func.jvp, dual tensors); "
                "backend='eager' has them (MERIT_FAST_BACKEND=eager in a patched model)"
            )


def entry_by_entry(op: Any) -> None:
    """Gives a custom op its vmap: ``call_by_entry``."""
    op.register_vmap(functools.partial(call_by_entry, op))


def call_by_entry(
    call: Callable[..., Any], info: Any, dimensions: tuple[Any, ...], *inputs: Any
) -> tuple[Any, Any]:
    """Calls once for each entry under torch.vmap: sums over rows must not cross entries.

    Raises:
        ValueError: there is no entry, so that nothing tells the results' shapes.
    """
    if not info.batch_size:
        raise ValueError("torch.vmap: a batch must have an entry, got a dimension of 0")
    outputs = []
    for entry in range(info.batch_size):
        pairs = zip(inputs, dimensions, strict=True)
        outputs.append(call(*(x.select(d, entry) if isinstance(d, int) else x for x, d in pairs)))
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])


def tags(*names: str) -> list[torch.Tag]:
    """torch's tags of these names, without those that an older torch lacks."""
    return [getattr(torch.Tag, name) for name in names if hasattr(torch.Tag, name)]
