"""Stage one: gradients (hooks) -> statistics (sums) -> conflict (numbers) -> partition (groups).

``sketch_mixture`` runs the model and writes one file of sums per dataset; ``split_mixture`` only reads those.
"""

from typing import Any

from merit_fast.split.config import SketchConfig, SplitConfig

__all__ = ["SketchConfig", "SplitConfig", "sketch_mixture", "split_mixture"]


def __getattr__(name: str) -> Any:
    if name == "sketch_mixture":
        from merit_fast.sketch.stage import sketch_mixture

        return sketch_mixture
    if name == "split_mixture":
        from merit_fast.split.stage import split_mixture

        return split_mixture
    raise AttributeError(name)
