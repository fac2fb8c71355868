"""Stage MERGE: checkpoints and weights in; one checkpoint or loaded model out. Imports no torch.

The methods stand in ``table``. Data flows from ``read`` (headers) through ``combine`` (numbers) and
``engine`` (bytes) to ``write`` (files) or ``in_memory`` (models).
"""

from merit_fast.merge.combine.combination import combine
from merit_fast.merge.combine.weights import resolve_weights
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.in_memory.state_dicts import merge_state_dicts
from merit_fast.merge.parameters import Parameter
from merit_fast.merge.prepared import PreparedMerge, method_fingerprint, prepare_merge, same_bytes
from merit_fast.merge.registry import register_method
from merit_fast.merge.stage import load_merged, merge_branches, merge_models, merge_trajectory
from merit_fast.merge.write.card import RunFacts

__all__ = [
    "MergeConfig",
    "Parameter",
    "PreparedMerge",
    "RunFacts",
    "combine",
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
