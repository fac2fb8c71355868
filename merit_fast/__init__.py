"""MERIT (arXiv 2606.01717), fast: split a mixture by gradient conflicts, train apart, merge once.

``import merit_fast`` is light: it imports neither torch, transformers nor triton.
"""

import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any

from merit_fast.errors import BackendUnavailableError, InputError, MeritFastError

if TYPE_CHECKING:  # type checkers and the API reference see the names that load lazily
    from merit_fast.merge import load_merged, merge_models
    from merit_fast.model.layered.load import load_layered
    from merit_fast.patch.model import patch_model
    from merit_fast.row_store.rows import open_rows
    from merit_fast.sketch.collector import kfac_factors
    from merit_fast.sketch.gradients import sketch_gradients
    from merit_fast.sketch.summed import sketch_sums

__version__ = "0.2.0"
__all__ = [
    "BackendUnavailableError",
    "InputError",
    "MeritFastError",
    "__version__",
    "kfac_factors",
    "load_layered",
    "load_merged",
    "merge_models",
    "open_rows",
    "patch_model",
    "run",
    "sketch_gradients",
    "sketch_sums",
]

_MODULES = {  # public names that are imported when they are first used
    "kfac_factors": "merit_fast.sketch.collector",
    "load_layered": "merit_fast.model.layered.load",
    "load_merged": "merit_fast.merge",
    "merge_models": "merit_fast.merge",
    "open_rows": "merit_fast.row_store.rows",
    "patch_model": "merit_fast.patch.model",
    "sketch_gradients": "merit_fast.sketch.gradients",
    "sketch_sums": "merit_fast.sketch.summed",
}
_PUBLIC_MODULES = ("integrations", "kernels", "merge")  # documented, next to the names above


def __getattr__(name: str) -> Any:
    """Imports a public name, or a module of the package, when it is first used."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name[0] != "_" and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_PUBLIC_MODULES])


def run(config: str | os.PathLike[str], *overrides: str) -> dict[str, Any]:
    """Brings every stage of a run's YAML up to date, as ``merit-fast run`` does.

    Args:
        config: the YAML file.
        overrides: ``section.key=value`` strings that override its values.

    Returns:
        the run's summary: "arms" (name -> losses, exact match, retention), "split" (dataset ->
        group), "merging_gain", "merged" and "report" (paths).

    Raises:
        InputError: the config or a file it names breaks a rule.
        MeritFastError: the run could not be finished.
    """
    from pathlib import Path

    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.run import Run, check_output

    parsed = read_run_config(Path(config), overrides)
    check_output(parsed)
    return Run(parsed).all()
