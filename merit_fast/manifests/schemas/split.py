"""Schema of split.json."""

import functools

from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.records import field, record


@record
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


@record
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


@record
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


@record
class SplitDataset:
    """One dataset's row of split.json."""

    name: str
    group: int  # -1: its rows go to all groups in equal shares
    num_examples: int
    num_target_tokens: int
    num_sketched_examples: int
    mean_loss: float  # nats per target token where the sketch was taken, over the sketched examples
    gradient_norm: float | None  # of the mean per-example gradient's sketch; None: not resolved
    signal_fraction: float  # unbiased |mean gradient|^2 over its raw estimate; 1 is noiseless
    signal_error: float | None  # its standard error
    more_examples: int  # 0: the signal is resolved; else about how many more examples would do that
    margin: float  # by how much the objective falls if it moves to its best other group
    stability: float  # of its company when a block of examples is left out, 0..1
    noise_scale: float | None = None  # tr(covariance) / |mean gradient|^2, examples
    noise_scale_error: float | None = None
    suggested_share: float | None = None  # of a batch, so that a step helps all datasets alike
    suggested_share_error: float | None = None
    median_length: int | None = None  # target tokens of the sketched rows; None: not known
    long_length: int | None = None  # 95 % of the sketched rows have no more target tokens
    weighting_cosine: float | None = None  # of the mean gradients by tokens and by examples


@record
class SharedRows:
    """Two datasets that share some of their sketched rows."""

    first: str
    second: str
    rows: int  # different rows that both have


@record
class SplitManifest:
    """split.json: the group of every dataset and the conflict geometry. N datasets, R axes."""

    groups: int
    datasets: tuple[SplitDataset, ...]
    method: str
    balance: str
    reason: str  # of an automatic K; "" where it was asked for
    note: str  # why the balance's tolerance is not kept; "" if it is
    sketched_at: str  # "the base model", or after which warm-up
    similarity: tuple[tuple[float | None, ...], ...]  # [N, N] cosines; None: not resolved
    similarity_errors: tuple[tuple[float | None, ...], ...]  # [N, N] block-jackknife errors
    negative_pair_fraction: float
    certain_negative_fraction: float  # below zero by two standard errors
    within_cosine: float | None  # mean over the pairs within groups
    across_cosine: float | None
    explained_variance: tuple[float, ...]  # [R] share of each conflict axis
    scores: tuple[tuple[float, ...], ...]  # [N, R]
    score_errors: tuple[tuple[float, ...], ...]  # [N, R]
    cuts: tuple[tuple[int, float], ...]  # (axis, score) of each median cut; method pca-median only
    separations: tuple[GroupCount, ...]  # of the split itself; older files: of every K tried
    controls: tuple[tuple[int, ...], ...]  # [C, N] distinct random splits, none of them this one
    num_splits: int | None  # balanced splits, this one included; None: too many to count
    base_fingerprint: str
    start_fingerprint: str  # of the model whose gradients were sketched: the base, or the warm-up's
    mixture_fingerprint: str
    sure_conflicts: int = 0  # pairs whose cosine is below 0 though so many were tested
    sure_conflicts_across: int = 0  # those of them whose datasets are in different groups
    unbalanced: tuple[int, ...] = ()  # [N] groups found without a balance; empty: none was sought
    unbalanced_eta_squared: float | None = None  # of these groups, debiased
    gram: tuple[tuple[float, ...], ...] = ()  # [N, N] <mean gradient, mean gradient>, debiased
    noise_scale: float | None = None  # of the mixture by token shares, examples; None: not resolved
    noise_scale_error: float | None = None
    numbers_tried: tuple[TriedNumber, ...] = ()  # every K tried, rising
    weight: str = ""  # what a sketched row counts: its target tokens, or 1 with examples
    shared_rows: tuple[SharedRows, ...] = ()  # only pairs of datasets that share some
    parts: dict[str, PartConflict] = field(default_factory=dict)  # of the model, in config's order
    schema_version: int = SCHEMA_VERSION

    def group_of(self, arm: str) -> dict[str, int]:
        """dataset name -> group, for the arm ``merit`` or a control of ``control_arms``."""
        if arm == "merit":
            groups: tuple[int, ...] = tuple(row.group for row in self.datasets)
        else:
            groups = self.controls[self.control_arms.index(arm)]
        return {row.name: group for row, group in zip(self.datasets, groups, strict=True)}

    @property
    def control_arms(self) -> tuple[str, ...]:
        """Arms of the random controls: random, random2, random3, in the order of ``controls``."""
        numbers = range(1, len(self.controls) + 1)
        return tuple(f"random{number if number > 1 else ''}" for number in numbers)

    @functools.cached_property
    def known_pairs(self) -> tuple[tuple[int, int, float], ...]:
        """(i, j, cosine) of every pair i < j with a resolved cosine."""
        rows = enumerate(self.similarity)
        pairs = ((i, j, row[j]) for i, row in rows for j in range(i + 1, len(row)))
        return tuple((i, j, cosine) for i, j, cosine in pairs if cosine is not None)

    @property
    def separation(self) -> GroupCount | None:
        """Separation of the split itself; None for one group."""
        matches = (count for count in self.separations if count.groups == self.groups)
        return next(matches, None)

    @property
    def parting(self) -> TriedNumber | None:
        """Contrast of the split itself; None for one group."""
        return next((row for row in self.numbers_tried if row.groups == self.groups), None)
