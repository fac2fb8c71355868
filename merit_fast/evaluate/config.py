"""Options of the evaluate stage."""

from typing import Literal

from merit_fast.kernels.average.dtypes import SPELLINGS
from merit_fast.options.fields import option, require
from merit_fast.records import record, replace


@record
class EvaluateConfig:
    """Options for the measurements of every arm."""

    batch_size: int = option(32, "most held-out rows per forward pass")
    interpolate: tuple[float, ...] = option(
        [0.25, 0.5, 0.75], "controls base + a * (joint - base) for these a (WiSE-FT); no training"
    )
    max_new_tokens: int = option(48, "longest greedy answer to a retention prompt, in tokens")
    dtype: Literal["auto", "bf16", "fp32"] = option(
        "auto",
        "precision of the forward passes; auto: bf16 where it is fast on this machine, else fp32",
        spellings=SPELLINGS,
    )
    audit: bool = option(
        False, "also check each merge against the theory of its gain (float32, minutes)"
    )
    audit_rows: int = option(128, "held-out rows of the audit, dataset by dataset in turn")
    audit_points: int = option(3, "points between two branches at which the barrier is measured")

    def without_audit(self) -> "EvaluateConfig":
        """The options that decide evaluate.json; the audit's are set to fixed values."""
        return replace(self, audit=False, audit_rows=1, audit_points=1)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)
        require(self.max_new_tokens >= 1, "max_new_tokens", "at least 1", self.max_new_tokens)
        require(self.audit_rows >= 1, "audit_rows", "at least 1", self.audit_rows)
        require(self.audit_points >= 1, "audit_points", "at least 1", self.audit_points)
        for value in self.interpolate:
            require(0 < value < 1, "interpolate", "between 0 and 1", value)
