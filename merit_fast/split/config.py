"""Options of the sketch and split stages. A split's options contain its sketch's, in one `split:` section."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from merit_fast.config import option, require


@dataclass(frozen=True)
class SketchConfig:
    """What the gradients' sketches depend on."""

    examples: int = option(200, "calibration examples per dataset (the paper: up to 200; fewer if it has fewer)")
    proj_dim: int = option(65536, "width of the CountSketch, a multiple of 16")
    seed: int = option(0, "seed of the sketch's hash, of the choice of examples and of the random control")
    blocks: int = option(8, "blocks of examples per dataset, for standard errors")
    batch_size: int = option(8, "examples per backward pass (does not change the sketch beyond rounding)")
    dtype: Literal["bf16", "fp32"] = option("bf16", "precision of the model's forward and backward pass")

    def __post_init__(self) -> None:
        require(self.examples >= 2, "examples", "at least 2", self.examples)
        require(self.proj_dim >= 16 and self.proj_dim % 16 == 0, "proj_dim", "a multiple of 16", self.proj_dim)
        require(self.blocks >= 2, "blocks", "at least 2", self.blocks)
        require(self.batch_size >= 1, "batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class SplitConfig(SketchConfig):
    """What the groups depend on, beside the sketches."""

    groups: int = option(4, "number of groups K, a power of two: 2, 4 or 8")
    preset: Literal["paper"] = option(
        "paper", "paper: naive cosines, column-centred PCA, recursive weighted medians, as published"
    )
    balance: Literal["samples", "tokens"] = option("samples", "what the medians balance (the paper: samples)")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.groups in (2, 4, 8), "groups", "2, 4 or 8 with preset paper", self.groups)

    def sketch_config(self) -> SketchConfig:
        """The part that decides the sketches."""
        return SketchConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(SketchConfig)})
