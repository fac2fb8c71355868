"""NumPy, imported when one of its names is first used: a plan and a help text need none of it."""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["np"]


class _Lazy:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        value = getattr(importlib.import_module(self._name), name)
        setattr(self, name, value)
        return value


if TYPE_CHECKING:
    import numpy as np
else:
    np = _Lazy("numpy")
