"""Preconditioners of gradients: Adam's second moments entry by entry, K-FAC's factors by side."""

from merit_fast.sketch.precondition.adam import (
    adam_scales,
    adam_scales_of_checkpoint,
    requested_scales,
)
from merit_fast.sketch.precondition.factors import KfacFactors
from merit_fast.sketch.precondition.moments import FactorSums
from merit_fast.sketch.precondition.sides import (
    NoFactorError,
    Preconditioner,
    Sides,
    scales_fingerprint,
)

__all__ = [
    "FactorSums",
    "KfacFactors",
    "NoFactorError",
    "Preconditioner",
    "Sides",
    "adam_scales",
    "adam_scales_of_checkpoint",
    "requested_scales",
    "scales_fingerprint",
]
