"""The plugin that ms-swift loads by --external_plugins: it adds the callback ``merit``."""

from __future__ import annotations

from typing import Any

from merit_fast.integrations.stacks.callback import StackCallback

NAME = "merit"


class SwiftCallback(StackCallback):
    """The callback of a stack, made with ms-swift's own arguments."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()
        self.args = args
        self.trainer = trainer


def register() -> None:
    """Adds the callback to ms-swift's.

    Raises:
        ImportError: ms-swift is not installed.
    """
    from swift.callbacks.mapping import callbacks_map

    callbacks_map[NAME] = SwiftCallback


if __name__.startswith("_swift_external"):  # the name under which ms-swift imports a plugin
    register()
