"""Updates inside the backward pass, so that gradients do not live together."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class InBackward:
    """Hooks that update a parameter as soon as its gradient is complete and then free the gradient.

    Made by ``FusedAdamW.step_in_backward``; ends with ``remove`` or at the end of a with-block. Meanwhile ``step``
    finds no gradient and does nothing, but for learning-rate schedulers it should still be called. A weight that is
    used several times, as a tied one is, is updated once, when all its uses have been passed.

    One backward pass is one step, so micro-batches cannot be accumulated: every pass would update. Checkpointing with
    ``use_reentrant=True`` runs passes of its own and would update a shared weight more than once; use False.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        update: Callable[[dict[str, Any], int, Tensor], None],
    ) -> None:
        members = [(group, parameter) for group in groups for parameter in group["params"]]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(update, group, place))
            for place, (group, parameter) in enumerate(members)
            if parameter.requires_grad
        ]

    @staticmethod
    def _hook(
        update: Callable[[dict[str, Any], int, Tensor], None], group: dict[str, Any], place: int
    ) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            update(group, place, parameter)
            parameter.grad = None

        return hook

    def remove(self) -> None:
        """Gradients are kept again, for ``step``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "InBackward":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
