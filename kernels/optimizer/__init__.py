"""AdamW in one pass over each parameter: clip, decay, moments, rounding, average of weights, zeroed gradient."""

from merit_fast.kernels.optimizer._adamw import FusedAdamW
from merit_fast.kernels.optimizer._in_backward import InBackward

__all__ = ["FusedAdamW", "InBackward"]
