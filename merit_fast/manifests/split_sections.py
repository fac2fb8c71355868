"""Schemas of the sections of split.json: separation, numbers tried, parts of the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupCount:
    """Separation of a split into ``groups`` groups.

    Values are shares of the weighted sum of squares that lie between groups, in [0, 1]. None: not
    resolved, because nothing varies beyond noise or noise took the estimate far out of [0, 1].
    """

    groups: int
    eta_squared: float | None  # of the split itself, debiased
    cross_validated: float | None  # splits made on one half of the examples, measured on the other
    null_mean: float | None  # the same of other balanced splits
    null_std: float | None  # None with fewer than 20 of them
    null_splits: int = 0  # distinct random splits behind the null, this split not among them
    null_beaten: int | None = None  # how many of them have a lower share; None: not measured
    num_splits: int | None = None  # balanced splits, this one included; None: too many to count


@dataclass(frozen=True)
class TriedNumber:
    """Contrast of the pairs of datasets that a split parts with those that it keeps.

    Mean cosines over blocks of examples that did not choose the split. None: no such pair.
    """

    groups: int
    kept_cosine: float | None
    parted_cosine: float | None
    parted_error: float | None
    coarser: int  # groups of the split that the next figures compare with; 1: all in one group
    further_cosine: float | None  # of the pairs that this split parts and that one keeps
    difference: float | None  # kept_cosine - further_cosine
    difference_error: float | None
    taken: bool = False  # whether this number qualified for groups auto


@dataclass(frozen=True)
class PartConflict:
    """Conflicts of N datasets in the gradients of one part of the model.

    The groups are those of the whole model.
    """

    similarity: tuple[tuple[float | None, ...], ...]  # [N, N] cosines; None: not resolved
    similarity_errors: tuple[tuple[float | None, ...], ...]  # [N, N] block-jackknife errors
    norm_shares: tuple[float | None, ...]  # [N] of the whole's |mean gradient|^2, debiased
    negative_pair_fraction: float
    certain_negative_fraction: float  # below zero by two standard errors
    within_cosine: float | None  # mean over the pairs within groups
    across_cosine: float | None
    sure_conflicts: int  # pairs whose cosine is below 0 though so many were tested
    sure_conflicts_across: int  # those of them whose datasets are in different groups
