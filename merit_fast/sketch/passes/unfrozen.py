"""Weights whose gradients one pass computes; none of them stays in ``parameter.grad``."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from merit_fast.sketch.capture.taps import Receive


class UnfrozenWeights:
    """Unfreezes parameters until ``freeze``; every backward pass hands on their gradients.

    A gradient is freed as soon as it was received, so at most one more weight is in memory.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], receive: Receive) -> None:
        self.parameters = list(parameters.values())
        self._turned = [p for p in self.parameters if not p.requires_grad]
        self._kept = [(p, p.grad) for p in self.parameters if p.grad is not None]
        self._handles = []
        for name, parameter in parameters.items():
            parameter.grad = None
            parameter.requires_grad_(True)
            hook = functools.partial(_hand_on, receive, name)
            weight: Any = parameter  # torch has no types for these two
            self._handles.append(weight.register_hook(hook))
            self._handles.append(weight.register_post_accumulate_grad_hook(_free))

    def freeze(self) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter in self._turned:
            parameter.requires_grad_(False)
        for parameter, gradient in self._kept:
            parameter.grad = gradient


def _hand_on(receive: Receive, name: str, gradient: Tensor | None) -> None:
    if gradient is not None:  # a part of the graph that nothing reached
        receive(name, gradient)


def _free(parameter: Tensor) -> None:
    parameter.grad = None
