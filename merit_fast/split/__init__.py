"""The split stage: the sketch stage's sums become groups of datasets. NumPy only.

The sketch stage's files come in; ``split.json`` goes out. The pipeline and ``merit-fast split``
call ``split_mixture``.
"""

from typing import TYPE_CHECKING, Any

from merit_fast.split.config import SplitConfig

if TYPE_CHECKING:
    from merit_fast.split.stage import split_mixture

__all__ = ["SplitConfig", "split_mixture"]


def __getattr__(name: str) -> Any:
    if name == "split_mixture":
        from merit_fast.split.stage import split_mixture

        return split_mixture
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
