"""Stage three: token-weighted averaging of sharded checkpoints, streamed from files to files. Imports no torch.

checkpoint (headers) -> methods (coefficients) -> plan (byte ranges) -> stream (the engine) -> stage (directories)
"""

from merit_fast.merge.config import MergeConfig
from merit_fast.merge.methods import combine
from merit_fast.merge.stage import merge_branches, merge_models, resolve_weights

__all__ = ["MergeConfig", "combine", "merge_branches", "merge_models", "resolve_weights"]
