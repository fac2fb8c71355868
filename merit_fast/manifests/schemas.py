"""Schemas of the JSON files in which stages meet: one dataclass for each file or section of one."""

from dataclasses import dataclass, field

from merit_fast.manifests.split_sections import GroupCount, PartConflict, TriedNumber

SCHEMA_VERSION = 3  # 3: several controls, seeds and paired comparisons; run.json


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SharedRows:
    """Two datasets that share some of their sketched rows."""

    first: str
    second: str
    rows: int  # different rows that both have


@dataclass(frozen=True)
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

    @property
    def separation(self) -> GroupCount | None:
        """Separation of the split itself; None for one group."""
        matches = (count for count in self.separations if count.groups == self.groups)
        return next(matches, None)

    @property
    def parting(self) -> TriedNumber | None:
        """Contrast of the split itself; None for one group."""
        return next((row for row in self.numbers_tried if row.groups == self.groups), None)


@dataclass(frozen=True)
class BranchManifest:
    """branch.json, written with a branch's weights.

    A merge weighs branches by ``num_target_tokens``.
    """

    branch: str  # merit-0, random-3, joint
    arm: str
    group: int
    datasets: tuple[str, ...]
    num_examples: int  # seen in training, epochs counted
    num_target_tokens: int  # in the loss, after the shift, epochs counted
    num_tokens: int  # through the model, epochs counted, padding not
    steps: int
    seed: int
    base_fingerprint: str
    start_fingerprint: str  # of the model it was trained from: the base, or the warm-up's
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class DatasetResult:
    loss: float  # nats per target token
    exact_match: float  # share of rows whose every target token is the greedy choice
    num_target_tokens: int
    num_examples: int


@dataclass(frozen=True)
class ArmResult:
    """One model on the held-out rows, with the columns that show what it forgot (retention).

    Retention is measured for arms, and None for the branches of a merge.
    """

    loss: float  # nats per target token, mean over datasets
    token_loss: float  # nats per target token, mean over tokens
    exact_match: float  # mean over datasets, 0..1
    text_loss: float | None  # nats per token of a fixed general English text
    chat_nll: float | None  # nats per token of the base's own greedy answers to fixed prompts
    answer_length_tokens: float | None  # mean length of this model's greedy answers to the prompts
    displacement: float  # |theta - theta_0|
    num_tokens: int = 0  # trained on, over all branches of the arm
    num_target_tokens: int = 0
    steps: int = 0  # of the longest branch
    train_s: float = 0.0  # summed over branches
    peak_memory_bytes: int = 0  # of the process while training, largest branch
    datasets: dict[str, DatasetResult] = field(default_factory=dict)
    num_seeds: int = 1  # models behind these means, one for each seed of training
    errors: dict[str, float] = field(default_factory=dict)  # measure -> standard error over seeds


@dataclass(frozen=True)
class Comparison:
    """One arm minus another on one measure, paired by held-out row and by seed."""

    first: str
    second: str
    measure: str  # a field of ArmResult: loss, exact_match, text_loss or chat_nll
    difference: float  # first - second, mean over seeds
    item_error: float | None  # standard error over rows (stratified by dataset); None: one row
    seed_error: float | None  # standard error over seeds; None: one seed
    num_items: int
    num_seeds: int


@dataclass(frozen=True)
class Barrier:
    """Rise of the loss above a straight line, on the straight path between two branches."""

    first: str
    second: str
    height: float  # nats per target token


@dataclass(frozen=True)
class MergeAudit:
    """One merge compared with the theory of its gain.

    Losses are nats per target token of the audit's rows, by float32 models.
    """

    gain: float  # sum_k w_k L(theta_k) - L(theta)
    predicted_gain: float  # sum_k w_k (g^T delta_k + 1/2 delta_k^T H delta_k), g and H at the merge
    branch_losses: tuple[float, ...]
    merged_loss: float
    barriers: tuple[Barrier, ...]
    noise: tuple[tuple[float, float], ...]  # (share of each tensor's rms, rise of the loss)
    displacement: float  # |theta - start|
    contraction: float  # |theta - start|^2 / sum_k w_k |theta_k - start|^2
    num_examples: int

    @property
    def ratio(self) -> float:
        """Measured over predicted gain; nan without a prediction."""
        return self.gain / self.predicted_gain if self.predicted_gain else float("nan")

    @property
    def in_basin(self) -> bool:
        """Whether the quadratic theory explains the gain to within 10 %."""
        return abs(self.ratio - 1.0) <= 0.1


@dataclass(frozen=True)
class AuditManifest:
    """audit.json: every merged arm's audit."""

    arms: dict[str, MergeAudit]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class MergingGain:
    """sum_k w_k L(theta_k) - L(theta_bar); L: held-out loss per target token of the mixture."""

    gain: float
    mean_branch_loss: float
    merged_loss: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class EvaluateManifest:
    """evaluate.json: arm -> result; branch -> result; merged arm -> gain."""

    arms: dict[str, ArmResult]
    branches: dict[str, ArmResult]
    merging_gain: dict[str, MergingGain]
    comparisons: tuple[Comparison, ...] = ()
    schema_version: int = SCHEMA_VERSION
