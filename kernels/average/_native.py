"""The average's calls of merit_fast._C. Imports no torch."""

from collections.abc import Sequence

from merit_fast.kernels import dispatch


def weighted_average(
    inputs: Sequence[int],
    types: Sequence[int],
    weights: Sequence[float],
    out: int,
    out_type: int,
    elements: int,
) -> None:
    """Average K runs of ``elements`` at their addresses; types are codes of ``FLOAT_DTYPES``."""
    dispatch.native().weighted_average(
        inputs=inputs,
        types=types,
        weights=weights,
        out=out,
        out_type=out_type,
        elements=elements,
    )
