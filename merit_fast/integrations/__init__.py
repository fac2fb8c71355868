"""Foreign formats and interfaces, in both directions. Public names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_fast.integrations.per_dataset.callback import MeritCallback
    from merit_fast.integrations.projector import Projector

__all__ = ["MeritCallback", "Projector"]

_MODULES = {"MeritCallback": "per_dataset.callback", "Projector": "projector"}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and torch with it, when it is first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
