"""Two registered methods and their formulas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.merge import Parameter

Floats = NDArray[np.float64]
POWER = Parameter("power", 2.0, "exponent", 1.0, 4.0)


def power_mean(deltas: Floats, weights: Floats, power: float) -> Any:
    """Signed power mean of the deltas."""
    raised = np.sign(deltas) * np.abs(deltas) ** power
    total = (weights[:, None] * raised).sum(axis=0)
    return np.sign(total) * np.abs(total) ** (1 / power)


def largest(models: Floats, weights: Floats) -> Any:
    """The largest element of any model."""
    return models.max(axis=0)


PACKAGE = """
import numpy as np
from merit_fast.merge import Parameter, register_method

def offered(deltas, weights, gain):
    return gain * (weights[:, None] * deltas).sum(axis=0)

register_method("offered", offered, parameters=[Parameter("gain", None, "a factor", 0.0, 2.0)])
"""
