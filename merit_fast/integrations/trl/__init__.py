"""TRL on our kernels: losses per dataset under packing, our head, merges at save time.

Input: TRL's trainers and their rows. Output: the trainers' own outputs, with branch.json. Importing
this package needs no TRL; its names need it.
"""

import importlib
from typing import TYPE_CHECKING, Any

from merit_fast.errors import InputError

if TYPE_CHECKING:
    from merit_fast.integrations.trl.head import use_head
    from merit_fast.integrations.trl.merging import MergeConfig, MergeModelCallback
    from merit_fast.integrations.trl.packing import pack_rows
    from merit_fast.integrations.trl.trainer import MeritSFTTrainer

__all__ = ["MergeConfig", "MergeModelCallback", "MeritSFTTrainer", "pack_rows", "use_head"]

_MODULES = {
    "MergeConfig": "merging",
    "MergeModelCallback": "merging",
    "MeritSFTTrainer": "trainer",
    "pack_rows": "packing",
    "use_head": "head",
}


def __getattr__(name: str) -> Any:
    """Imports the module of a public name, and TRL with it, when it is first used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise InputError(f"{__name__}.{name}: needs TRL: pip install 'merit_fast[trl]'") from None
