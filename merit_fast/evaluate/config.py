"""Options of the evaluate stage."""

from dataclasses import dataclass
from typing import Literal

from merit_fast.config import option, require


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured on every arm."""

    batch_size: int = option(32, "held-out rows per forward pass")
    interpolate: tuple[float, ...] = option(
        [0.25, 0.5, 0.75], "controls base + a * (joint - base) for these a (WiSE-FT); no training"
    )
    max_new_tokens: int = option(48, "longest greedy answer to a retention prompt, in tokens")
    dtype: Literal["bf16", "fp32"] = option("bf16", "precision of the forward passes")

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        for value in self.interpolate:
            require(0 < value < 1, "interpolate", "between 0 and 1", value)
