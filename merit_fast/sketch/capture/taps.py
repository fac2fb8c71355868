"""Identities in the graph whose backward pass hands gradients on, and backward passes within it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.sketch.capture.layout import Pass

Receive = Callable[[str, Tensor], None]  # a parameter's name and gradient


@dataclass(frozen=True)
class ExtraPass:
    """A backward pass that runs inside the user's.

    Attributes:
        run: the forward pass through whose graph it runs.
        target: the sketches to which its taps add; None: they add nothing.
        receive: gets the gradient of every unfrozen parameter; None: nobody does.
    """

    run: Pass
    target: Pass | None = None
    receive: Receive | None = None


# Backward passes run on threads of autograd's own, so this is no thread's local value.
_extra: list[ExtraPass] = []


def extra_pass() -> ExtraPass | None:
    """The innermost pass of our own that is running; None in the user's."""
    return _extra[-1] if _extra else None


@contextmanager
def entered(extra: ExtraPass) -> Iterator[None]:
    _extra.append(extra)
    try:
        yield
    finally:
        _extra.pop()


class Tap(torch.autograd.Function):
    """Identity on ``count`` outputs; its backward pass calls ``sink(their gradients, *inputs)``.

    Autograd itself keeps the inputs, so checkpointing and offloading treat them as its own. The
    results are no views, so they may be modified in place, and autograd still notices such changes
    to saved tensors. ``anchor`` requires a gradient, so that with frozen weights the graph begins
    here.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, sink: Callable[..., None], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.sink = sink
        ctx.count = count
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if any(dy is not None for dy in dys):
            ctx.sink(dys, *inputs)
        needs = ctx.needs_input_grad[3 : 3 + ctx.count]
        passed = [dy if needed else None for dy, needed in zip(dys, needs, strict=True)]
        return (None, None, None, *passed, *(None for _ in inputs))


def tap(
    anchor: Tensor, outputs: Sequence[Tensor], sink: Callable[..., None], *inputs: Tensor
) -> tuple[Tensor, ...]:
    kept = (value.detach() for value in inputs)
    result: tuple[Tensor, ...] = Tap.apply(  # type: ignore[no-untyped-call]
        anchor, sink, len(outputs), *outputs, *kept
    )
    return result


def begin_at_output(anchor: Tensor, module: nn.Module, args: Any, output: Any) -> Any:
    """Gives reentrant checkpointing an input that requires a gradient: a forward hook."""
    needs_tap = isinstance(output, Tensor) and not output.requires_grad
    if not torch.is_grad_enabled() or not needs_tap:
        return output
    return tap(anchor, [output], lambda dys: None)[0]


def masked(dy: Tensor, part: tuple[Any, ...]) -> Tensor:
    """The gradient with the rows of every other example at 0."""
    result = torch.zeros_like(dy)
    result[part] = dy[part]
    return result
