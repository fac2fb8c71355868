"""Loads models, takes their fingerprints and measures their losses on target tokens.

Every stage that runs a model uses it.
"""

from merit_fast.model.adapters import is_adapter
from merit_fast.model.dtype import DTYPES, Dtype, SettledDtype, settle_dtype
from merit_fast.model.files import (
    copy_processor_files,
    model_fingerprint,
    resolve_model,
    weight_files,
)
from merit_fast.model.freeze import freeze_parameters
from merit_fast.model.inputs import model_inputs
from merit_fast.model.load import (
    auto_class,
    load_model,
    make_empty_model,
    no_loading_bar,
    without_router_logits,
)
from merit_fast.model.losses import TargetLosses, score_batch, score_targets, target_losses
from merit_fast.model.memory import (
    keep_freed_memory,
    peak_memory_bytes,
    reset_peak_memory,
    return_freed_memory,
)
from merit_fast.model.tree_trial import fit_trees, reads_trees
from merit_fast.model.vision import forget_positions, reads_images, tower_parameters

__all__ = [
    "DTYPES",
    "Dtype",
    "SettledDtype",
    "TargetLosses",
    "auto_class",
    "copy_processor_files",
    "fit_trees",
    "forget_positions",
    "freeze_parameters",
    "is_adapter",
    "keep_freed_memory",
    "load_model",
    "make_empty_model",
    "model_fingerprint",
    "model_inputs",
    "no_loading_bar",
    "peak_memory_bytes",
    "reads_images",
    "reads_trees",
    "reset_peak_memory",
    "resolve_model",
    "return_freed_memory",
    "score_batch",
    "score_targets",
    "settle_dtype",
    "target_losses",
    "tower_parameters",
    "weight_files",
    "without_router_logits",
]
