"""Schemas of evaluate.json and audit.json."""

from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.records import field, record


@record
class DatasetResult:
    loss: float  # nats per target token
    exact_match: float  # share of rows whose every target token is the greedy choice
    num_target_tokens: int
    num_examples: int


@record
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


@record
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


@record
class Barrier:
    """Rise of the loss above a straight line, on the straight path between two branches."""

    first: str
    second: str
    height: float  # nats per target token


@record
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


@record
class AuditManifest:
    """audit.json: every merged arm's audit."""

    arms: dict[str, MergeAudit]
    schema_version: int = SCHEMA_VERSION


@record
class MergingGain:
    """sum_k w_k L(theta_k) - L(theta_bar); L: held-out loss per target token of the mixture."""

    gain: float
    mean_branch_loss: float
    merged_loss: float
    weights: tuple[float, ...]


@record
class EvaluateManifest:
    """evaluate.json: arm -> result; branch -> result; merged arm -> gain."""

    arms: dict[str, ArmResult]
    branches: dict[str, ArmResult]
    merging_gain: dict[str, MergingGain]
    comparisons: tuple[Comparison, ...] = ()
    schema_version: int = SCHEMA_VERSION
