"""The plugin that ms-swift loads by --external_plugins: it adds the callback ``merit``."""

from __future__ import annotations

from typing import Any

from torch import nn

from merit_fast.integrations.stacks.callback import StackCallback
from merit_fast.integrations.stacks.counts import count_batch

NAME = "merit"


class SwiftCallback(StackCallback):
    """The callback of a stack, made with ms-swift's own arguments.

    It counts in the trainer's ``compute_loss``: with losses per channel, ms-swift takes the labels
    away before the model runs.
    """

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()
        self.args = args
        self.trainer = trainer
        self._counted: Any = None

    def _count_calls(self, model: nn.Module) -> None:
        if self._counted is not None:
            return
        self._counted = plain = self.trainer.compute_loss

        def compute_loss(model: nn.Module, inputs: Any, *rest: Any, **more: Any) -> Any:
            if model.training:
                self.counts += count_batch(inputs)
            return plain(model, inputs, *rest, **more)

        self.trainer.compute_loss = compute_loss


def register() -> None:
    """Adds the callback to ms-swift's.

    Raises:
        ImportError: ms-swift is not installed.
    """
    from swift.callbacks.mapping import callbacks_map

    callbacks_map[NAME] = SwiftCallback


if __name__.startswith("_swift_external"):  # the name under which ms-swift imports a plugin
    register()
