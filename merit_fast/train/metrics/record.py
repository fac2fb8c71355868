"""The numbers of one optimizer step or of one measurement on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DatasetSums:
    """Nats and target tokens of every dataset of a branch, in the order of branch.json."""

    losses: tuple[float, ...]  # summed
    tokens: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def mean(self) -> float:
        """Nats per target token over all datasets."""
        return sum(self.losses) / self.num_tokens

    @property
    def means(self) -> list[float | None]:
        """Nats per target token of each dataset; None: it has none here."""
        pairs = zip(self.losses, self.tokens, strict=True)
        return [loss / tokens if tokens else None for loss, tokens in pairs]


@dataclass(frozen=True)
class StepRecord:
    """One line of metrics.jsonl: a training step."""

    step: int  # done so far
    sums: DatasetSums
    num_tokens: int  # through the model
    learning_rate: float
    norm: float  # of the gradient, before clipping
    seconds: float

    def values(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "loss": self.sums.mean,
            "num_tokens": self.num_tokens,
            "num_target_tokens": self.sums.num_tokens,
            "learning_rate": self.learning_rate,
            "norm": self.norm,
            "seconds": round(self.seconds, 6),
            "dataset_losses": self.sums.means,
            "dataset_tokens": list(self.sums.tokens),
        }

    def scalars(self, names: Sequence[str]) -> dict[str, float]:
        """Numbers of ``values`` for a tracker, which knows scalars only."""
        scalars = {
            "loss": self.sums.mean,
            "learning_rate": self.learning_rate,
            "grad_norm": self.norm,
            "num_target_tokens": float(self.sums.num_tokens),
            "seconds": self.seconds,
        }
        return scalars | _by_name("loss", names, self.sums)


@dataclass(frozen=True)
class HeldOutRecord:
    """One line of metrics.jsonl: a measurement on the held-out rows."""

    step: int
    sums: DatasetSums

    def values(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "held_out_loss": self.sums.mean,
            "held_out_dataset_losses": self.sums.means,
            "held_out_dataset_tokens": list(self.sums.tokens),
        }

    def scalars(self, names: Sequence[str]) -> dict[str, float]:
        return {"eval_loss": self.sums.mean} | _by_name("eval_loss", names, self.sums)


def _by_name(key: str, names: Sequence[str], sums: DatasetSums) -> dict[str, float]:
    pairs = zip(names, sums.means, strict=True)
    return {f"{key}_{name}": mean for name, mean in pairs if mean is not None}
