"""Weights whose gradients one pass computes; none of them stays in ``parameter.grad``."""

import functools
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from merit_fast.sketch.capture.taps import Receive
from merit_fast.sketch.divided.places import is_away


class UnfrozenWeights:
    """Unfreezes parameters until ``freeze``; every backward pass hands on their gradients.

    A gradient is freed as soon as it was received, so at most one more weight is in memory.

    Args:
        slices: parameters that are DTensors are slices of tensor parallelism, and no shards.

    Attributes:
        parameters: by name.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], receive: Receive, slices: bool = False
    ) -> None:
        self.parameters = dict(parameters)
        self._slices = slices
        self._forms: dict[int, tuple[str, nn.Parameter]] = {}
        self._receive = receive
        self._turned: list[nn.Parameter] = []
        self._kept = [(p, p.grad) for p in self.parameters.values()]
        self._handles: list[Any] = []
        for name, parameter in self.parameters.items():
            parameter.grad = None
            self.arrive(name, parameter)

    def arrive(self, name: str, form: nn.Parameter) -> bool:
        """Takes a form of a parameter; returns whether this pass wants its gradient."""
        if name not in self.parameters:
            return False
        if not form.requires_grad:
            form.requires_grad_(True)
            self._turned.append(form)
        if (is_away(form) and not self._slices) or id(form) in self._forms:
            return True
        self._forms[id(form)] = (name, form)
        hook = functools.partial(_hand_on, self._receive, name)
        weight: Any = form  # torch has no types for these two
        self._handles.append(weight.register_hook(hook))
        self._handles.append(weight.register_post_accumulate_grad_hook(_free))
        return True

    def forms(self, names: Collection[str]) -> list[Tensor]:
        """The tensors that modules see: parameters, or what came to their places (``Arrivals``)."""
        return [form for name, form in self._forms.values() if name in names]

    def freeze(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._turned:
            parameter.requires_grad_(False)
        for parameter, gradient in self._kept:
            parameter.grad = gradient


def _hand_on(receive: Receive, name: str, gradient: Tensor | None) -> None:
    if gradient is not None:  # a part of the graph that nothing reached
        divided: Any = gradient
        receive(name, divided.full_tensor() if hasattr(divided, "full_tensor") else gradient)


def _free(parameter: Tensor) -> None:
    parameter.grad = None
