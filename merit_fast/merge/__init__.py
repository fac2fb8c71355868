"""Stage MERGE: checkpoints and weights in; one checkpoint or loaded model out. Imports no torch.

The methods stand in ``table``. Data flows from ``read`` (headers) through ``combine`` (numbers) and
``engine`` (bytes) to ``write`` (files) or ``in_memory`` (models).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # type checkers and the API reference see the names that load lazily
    from merit_fast.merge.combine.weights import resolve_weights
    from merit_fast.merge.config import MergeConfig
    from merit_fast.merge.in_memory.state_dicts import merge_state_dicts
    from merit_fast.merge.parameters import Parameter
    from merit_fast.merge.prepared import PreparedMerge, prepare_merge
    from merit_fast.merge.registry import register_method
    from merit_fast.merge.stage import (
        load_merged,
        merge_branches,
        merge_models,
        merge_trajectory,
    )
    from merit_fast.merge.write.card import RunFacts
    from merit_fast.merge.write.same import method_fingerprint, same_bytes

__all__ = [
    "MergeConfig",
    "Parameter",
    "PreparedMerge",
    "RunFacts",
    "load_merged",
    "merge_branches",
    "merge_models",
    "merge_state_dicts",
    "merge_trajectory",
    "method_fingerprint",
    "prepare_merge",
    "register_method",
    "resolve_weights",
    "same_bytes",
]

_MODULES = {  # where a public name is defined; a help text or a plan needs few of them
    "MergeConfig": "config",
    "Parameter": "parameters",
    "PreparedMerge": "prepared",
    "RunFacts": "write.card",
    "load_merged": "stage",
    "merge_branches": "stage",
    "merge_models": "stage",
    "merge_state_dicts": "in_memory.state_dicts",
    "merge_trajectory": "stage",
    "method_fingerprint": "write.same",
    "prepare_merge": "prepared",
    "register_method": "registry",
    "resolve_weights": "combine.weights",
    "same_bytes": "write.same",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
