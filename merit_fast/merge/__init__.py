"""Stage three: token-weighted averaging of sharded checkpoints, streamed from files to files. Imports no torch.

checkpoint (headers) -> plan (byte ranges) -> stream (the engine) -> stage (weights, directory, config files)
"""

from merit_fast.merge.config import MergeConfig
from merit_fast.merge.stage import combine, merge_branches, merge_models, resolve_weights

__all__ = ["MergeConfig", "combine", "merge_branches", "merge_models", "resolve_weights"]
