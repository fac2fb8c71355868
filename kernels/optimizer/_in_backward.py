"""Updates inside the backward pass, so that only a few gradients are in memory at once."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class InBackward:
    """Hooks that update a parameter as soon as its gradient is complete and then free the gradient.

    ``FusedAdamW.step_in_backward`` makes them; ``remove`` or the end of a with-block ends them.
    Meanwhile ``step`` meets no gradient and does nothing; call it all the same, for learning-rate
    schedulers. A weight with several uses, such as a tied one, is updated once, after the gradients
    of all its uses.

    One backward pass is one step, so micro-batches cannot be accumulated: every pass would update.
    Checkpointing with ``use_reentrant=True`` runs passes of its own and would update a shared
    weight more than once; use False.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        update: Callable[[dict[str, Any], int, Tensor], None],
    ) -> None:
        members = [(group, parameter) for group in groups for parameter in group["params"]]
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._hook(update, group, number))
            for number, (group, parameter) in enumerate(members)
            if parameter.requires_grad
        ]

    @staticmethod
    def _hook(
        update: Callable[[dict[str, Any], int, Tensor], None], group: dict[str, Any], number: int
    ) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            update(group, number, parameter)
            parameter.grad = None

        return hook

    def remove(self) -> None:
        """Removes the hooks: gradients are kept again, for ``step``."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "InBackward":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()
