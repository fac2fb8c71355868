"""Foreign formats and interfaces, in both directions. Public names are imported when first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from merit_fast.integrations.per_dataset.callback import MeritCallback
    from merit_fast.integrations.projector import Projector
    from merit_fast.integrations.training import fused_adamw, use_loss

__all__ = ["MeritCallback", "Projector", "fused_adamw", "use_loss"]

_MODULES = {
    "MeritCallback": "per_dataset.callback",
    "Projector": "projector",
    "fused_adamw": "training",
    "use_loss": "training",
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and torch with it, when it is first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
