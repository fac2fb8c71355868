"""Contrast of the pairs of datasets that a split parts with those that it keeps. Pure NumPy.

The split is chosen without block g of every dataset and measured on block g, g = 1..G, so neither
noise nor the choice makes a contrast, and no random split is needed: three datasets suffice.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merit_fast.split.conflict import mean_gram
from merit_fast.split.moments import BlockProducts
from merit_fast.split.student import upper_tail

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Parting:
    """Mean cosines of pairs, weighted by both datasets' shares, from G held-out blocks.

    Attributes:
        kept: of the pairs in one group. NaN where there is none.
        parted: of the pairs that the split puts into different groups.
        difference_error: standard error of kept - parted.
        parted_error: standard error of ``parted``.
        freedom: degrees of freedom of the errors, G - 1.
    """

    kept: float
    parted: float
    difference_error: float
    parted_error: float
    freedom: int

    def separates(self, chance: float) -> bool:
        """Whether kept pairs are more alike than parted ones (Student's t, one-sided)."""
        return _sure(self.kept - self.parted, self.difference_error, self.freedom, chance)

    def opposes(self, chance: float) -> bool:
        """Whether the parted pairs have a mean cosine below zero (Student's t, one-sided)."""
        return _sure(-self.parted, self.parted_error, self.freedom, chance)


class HeldOutBlocks:
    """Cosines that block g alone gives, g = 1..G: its products with itself and all others.

        c_g = <T_i, T_j> - <T_i - S_ig, T_j - S_jg>   divided by its pairs of examples and by the
              lengths that all blocks give; of datasets that share rows, different blocks only

    Args:
        products: products of the datasets' block sums.
        weights: [N] shares of the datasets, sum 1.
    """

    def __init__(self, products: BlockProducts, weights: Array) -> None:
        length = np.sqrt(mean_gram(products, "blocks").square)
        scale = np.outer(*2 * [np.where(length > 0, length, 1.0)])
        blocks = np.arange(products.weights.shape[1])
        total, all_pairs = products.independent(products.total, blocks)
        self.cosines: list[Array] = []
        self.masses: list[Array] = []
        for block, left_out in enumerate(products.left_out):
            rest, rest_pairs = products.independent(left_out, np.delete(blocks, block))
            pairs = all_pairs - rest_pairs
            known = np.triu(pairs > 0, 1)
            divisor = np.where(known, pairs * scale, 1.0)
            self.cosines.append((total - rest) / divisor)
            self.masses.append(np.where(known, np.outer(weights, weights), 0.0))

    def contrast(self, coarse: npt.NDArray[Any], fine: npt.NDArray[Any]) -> Parting:
        """Contrasts a split with a coarser one.

        Args:
            coarse: [G, N] labels of the coarser split, chosen without block g; zeros: one group.
            fine: [G, N] labels of the split. Counted as parted are pairs that ``coarse`` keeps. A
                dataset whose rows are spread over the groups (-1) is in no pair.
        """
        kept = []
        parted = []
        for cosine, mass, before, after in zip(
            self.cosines, self.masses, coarse, fine, strict=True
        ):
            whole = (after[:, None] >= 0) & (after >= 0)
            same = (after[:, None] == after) & whole
            kept.append(_mean(cosine, np.where(same, mass, 0.0)))
            apart = (before[:, None] == before) & whole & ~same
            parted.append(_mean(cosine, np.where(apart, mass, 0.0)))
        difference = np.subtract(kept, parted)
        return Parting(
            kept=float(np.mean(kept)),
            parted=float(np.mean(parted)),
            difference_error=_error(difference),
            parted_error=_error(np.array(parted)),
            freedom=len(parted) - 1,
        )


def _mean(values: Array, mass: Array) -> float:
    total = mass.sum()
    return float((values * mass).sum() / total) if total > 0 else math.nan


def _error(values: Array) -> float:
    """Standard error of the mean of figures [G], each of one block with itself and all others.

    Such a figure is quadratic in the sums, and a block moves the others' figures as much as its
    own: hence the factor of 2.
    """
    return float(2 * values.std(ddof=1) / math.sqrt(len(values)))


def _sure(value: float, error: float, freedom: int, chance: float) -> bool:
    if not value > 0 or math.isnan(error):
        return False
    return error == 0 or float(upper_tail(np.array(value / error), freedom)) <= chance
