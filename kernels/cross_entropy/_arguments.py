"""Arguments of linear + cross-entropy as every backend receives them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from merit_fast.kernels.sketch import CountSketch

if TYPE_CHECKING:  # some builds of torch lack it
    from torch.distributed import ProcessGroup


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
class LogitForm:
    """Logits of the products: softcap * tanh(scale * (products + bias) / softcap) / temperature."""

    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0


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


@dataclass(frozen=True)
class VocabularyShard:
    """Rows of a head whose other rows lie in the other processes of a group."""

    group: "ProcessGroup"
    first_row: int  # word of the vocabulary to which the first row here belongs
    num_rows: int  # of the whole head, in all processes
