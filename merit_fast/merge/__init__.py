"""Stage three: token-weighted averaging of sharded checkpoints, streamed from files to files. Imports no torch.

checkpoint, adapter, sources (headers) -> methods (rules) -> layout, plan (byte ranges) -> stream (the engine)
-> shards, companions (files) -> stage (directories); memory does without files.
"""

from merit_fast.merge.combine.combination import combine
from merit_fast.merge.combine.weights import resolve_weights
from merit_fast.merge.config import MergeConfig
from merit_fast.merge.in_memory.state_dicts import load_merged, merge_state_dicts
from merit_fast.merge.stage import merge_branches, merge_models, same_bytes

__all__ = [
    "MergeConfig",
    "combine",
    "load_merged",
    "merge_branches",
    "merge_models",
    "merge_state_dicts",
    "resolve_weights",
    "same_bytes",
]
