"""Hits of a search, and how many of them cannot be told apart."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from merit_fast.block_estimates import jackknife_error

_SURE = 2.0  # standard errors of a difference
_ROUNDING = 1e-5  # of a score, relative: equal rows may lie in other tiles of a product


@dataclass(frozen=True)
class Hit:
    """One stored example and its score.

    Attributes:
        dataset: name of its dataset.
        row: number of its row in the dataset's file, from 0.
        score: cosine or inner product with the target's mean.
        error: standard error of the score over the target's rows; None: the target has no blocks.
        place: number of the example among those of its row, from 0.
        left_out: scores with one block of the target left out.
    """

    dataset: str
    row: int
    score: float
    error: float | None
    place: int = 0
    left_out: tuple[float, ...] = field(default=(), repr=False, compare=False)


def count_indistinct(hits: Sequence[Hit]) -> int | None:
    """Number of hits that are not better than the last one by two standard errors.

    The error is that of the difference of both scores: they share the target, so it is smaller
    than their own errors tell. The last one does not count. None: there are no errors.
    """
    if not hits or not hits[-1].left_out:
        return None
    left_out = np.array([hit.left_out for hit in hits])
    scores = np.array([hit.score for hit in hits])
    errors = jackknife_error((left_out - left_out[-1]).T)
    rounding = _ROUNDING * np.abs(scores).max()
    return int((scores - scores[-1] <= _SURE * errors + rounding).sum()) - 1
