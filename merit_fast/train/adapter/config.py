"""Options of the adapter that a branch trains in place of all weights."""

import re
from typing import Literal

from merit_fast.options.fields import option, require
from merit_fast.records import fields, record

ALL_LINEAR = "all-linear"


@record
class AdapterConfig:
    """A low-rank adapter: W + s * B A with a frozen W (Hu et al. 2021, arXiv 2106.09685)."""

    kind: Literal["none", "lora", "rslora", "dora"] = option(
        "none",
        "none: all weights; lora: s = alpha / rank; rslora: s = alpha / sqrt(rank); dora: lora "
        "with a trained length for each output",
    )
    rank: int = option(16, "rank of every changed matrix")
    alpha: float = option(32.0, "the change is scaled by alpha / rank (rslora: / sqrt(rank))")
    dropout: float = option(0.0, "share of the adapter's inputs that is zeroed in training")
    targets: str | tuple[str, ...] = option(
        ALL_LINEAR,
        "modules to change: all-linear (all but the head), a list of their last names, or a "
        "regular expression for whole names",
    )
    modules_to_save: tuple[str, ...] = option(
        (), "last names of modules that are trained whole and saved with the adapter"
    )
    init: Literal["kaiming", "gaussian", "orthogonal"] = option(
        "kaiming", "start of A; B starts at zero (orthogonal: both random, their product zero)"
    )
    base: Literal["as-is", "4bit"] = option(
        "as-is", "the frozen weights: as-is, or 4bit (NF4 by bitsandbytes, QLoRA)"
    )
    save: Literal["adapter", "merged"] = option(
        "adapter", "the branch: adapter (a PEFT folder), or merged (a whole model)"
    )

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_read = self.kind != "none" or field.name == "kind" or value == field.default
            rule = "absent without a kind of adapter, such as kind: lora"
            require(is_read, field.name, rule, value)
        require(self.rank >= 1, "rank", "at least 1", self.rank)
        require(0 < self.alpha < float("inf"), "alpha", "positive and finite", self.alpha)
        require(0 <= self.dropout < 1, "dropout", "from 0 to below 1", self.dropout)
        require(len(self.targets) > 0, "targets", "all-linear, names or an expression", "")
        if isinstance(self.targets, str):
            require(_is_expression(self.targets), "targets", "a regular expression", self.targets)
        is_even = self.init != "orthogonal" or self.rank % 2 == 0
        require(is_even, "rank", "even with init: orthogonal", self.rank)
        is_whole = self.base == "4bit" and self.save == "merged"
        require(not is_whole, "save", "adapter with base: 4bit", "merged")

    @property
    def is_on(self) -> bool:
        """Whether an adapter is trained in place of all weights."""
        return self.kind != "none"

    @property
    def is_saved_apart(self) -> bool:
        """Whether the branch's folder holds the adapter and no whole model."""
        return self.is_on and self.save == "adapter"


def _is_expression(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
