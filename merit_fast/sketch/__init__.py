"""The sketch stage: per-example gradients at the base model become sums per dataset.

Rows and a model come in; one file of sums per dataset goes out (``manifests/sketch_state.py``). The
pipeline and ``merit-fast sketch`` call ``sketch_mixture``; scripts call ``sketch_gradients`` and
``sketch_sums``.
"""

from typing import TYPE_CHECKING, Any

from merit_fast.sketch.config import SketchConfig

if TYPE_CHECKING:
    from merit_fast.sketch.mixture.stage import sketch_mixture

__all__ = ["SketchConfig", "sketch_mixture"]


def __getattr__(name: str) -> Any:
    if name == "sketch_mixture":
        from merit_fast.sketch.mixture.stage import sketch_mixture

        return sketch_mixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
