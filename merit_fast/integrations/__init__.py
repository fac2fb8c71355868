"""Foreign formats and interfaces, in both directions. ``Projector`` is imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_fast.integrations.projector import Projector

__all__ = ["Projector"]


def __getattr__(name: str) -> Any:
    """Imports the projector, and torch with it, when it is first used."""
    if name == "Projector":
        return importlib.import_module("merit_fast.integrations.projector").Projector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
