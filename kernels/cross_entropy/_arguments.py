"""Arguments of linear + cross-entropy as every backend receives them."""

from dataclasses import dataclass

from torch import Tensor

from merit_fast.kernels.sketch import CountSketch


@dataclass(frozen=True)
class Batch:
    """A head and hidden states of examples that lie end to end, with their labels and datasets."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    labels: Tensor  # [N] int64
    offsets: Tensor  # [B + 1] int64: first token of each example, and N
    dataset_ids: Tensor | None  # [B] int64
    num_datasets: int
    dataset_weights: Tensor | None  # [num_datasets]


@dataclass(frozen=True)
class LossTerms:
    """Changes to the plain cross-entropy."""

    softcap: float | None
    label_smoothing: float
    z_loss: float


@dataclass(frozen=True)
class HeadSketch:
    """CountSketch of dW, per example, added to ``out`` instead of or next to dW itself."""

    sketch: CountSketch
    name: str
    out: Tensor  # [B, D] float32
