"""Options of the split stage.

They contain the sketch stage's options: the YAML has one `split:` section.
"""

from typing import Literal

from merit_fast.errors import InputError
from merit_fast.options.fields import option, require
from merit_fast.records import fields, record
from merit_fast.sketch.config import SketchConfig
from merit_fast.split.search.methods import METHODS, Method
from merit_fast.split.search.problem import Pins


@record
class Choices:
    """Options that a preset sets where the config leaves them out."""

    method: Method
    debias: Literal["blocks", "none"]
    center: Literal["tokens", "columns"]
    balance: Literal["tokens", "samples", "none"]
    weight: Literal["tokens", "examples"]


PRESETS = {
    "debiased": Choices("pca-swap", "blocks", "tokens", "tokens", "tokens"),
    "paper": Choices("pca-median", "none", "columns", "samples", "examples"),
}
*_FIRST_NAMES, _LAST_NAME = METHODS


@record
class SplitConfig(SketchConfig):
    """Options that decide the groups, next to the sketches'.

    None stands for the preset's choice (``PRESETS``).
    """

    groups: int | Literal["auto"] = option(
        4, "number of groups K; auto: the largest whose split parts conflicting datasets, or 1"
    )
    preset: Literal["debiased", "paper"] = option(
        "debiased",
        "paper: naive cosines, column-centred PCA, recursive medians, each example 1, as published",
    )
    method: Method | None = option(
        None,
        f"{', '.join(_FIRST_NAMES)} or {_LAST_NAME} [preset: {PRESETS['debiased'].method}]",
    )
    similarity: Literal["cosine", "gram"] = option(
        "cosine", "compares mean gradients by their cosines or by their inner products"
    )
    debias: Literal["blocks", "none"] | None = option(
        None, "blocks: norms free of sampling noise [preset: blocks]"
    )
    center: Literal["tokens", "columns"] | None = option(
        None,
        "tokens: weighted double centring; columns: unweighted, of the matrix's columns "
        "[preset: tokens]",
    )
    balance: Literal["tokens", "samples", "none"] | None = option(
        None, "the quantity that all groups hold equally [preset: tokens]"
    )
    tolerance: float | None = option(
        None, "how far a group may be from 1/K, as a share of all [0.05/K]"
    )
    min_steps: int = option(
        100, "with groups auto: least number of optimizer steps of the shortest branch"
    )
    pins: Pins = option(
        Pins(), "datasets together, apart or in one group: {together: [[a, b]], group: {c: 0}}"
    )
    spread: tuple[str, ...] = option([], "datasets whose rows go to all groups in equal shares")
    manual: tuple[tuple[str, ...], ...] = option(
        [], "with method manual: the datasets of every group"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        filled = self.filled()
        method = METHODS[filled.method]
        require(
            self.groups == "auto" or self.groups >= 1, "groups", "at least 1, or auto", self.groups
        )
        if method.power_of_two and self.groups != "auto" and self.groups & (self.groups - 1):
            raise InputError(
                f"groups: must be a power of two with method {method.name}, got {self.groups}"
            )
        few = filled.debias == "blocks" and self.blocks < 4
        require(
            not few,
            "blocks",
            "at least 4 with debias blocks: splits are judged on halves",
            self.blocks,
        )
        require(
            self.tolerance is None or self.tolerance >= 0, "tolerance", "at least 0", self.tolerance
        )
        require(self.min_steps >= 1, "min_steps", "at least 1", self.min_steps)
        if self.groups == "auto" and not method.chooses_groups:
            raise InputError(f"groups: must be a number with method {method.name}, got auto")
        if method.needs_manual != bool(self.manual):
            raise InputError(
                f"manual: goes with method manual, and only with it; got method {method.name}"
            )

    def sketch_config(self) -> SketchConfig:
        """Options that decide the sketches, with the preset's weight."""
        options = {field.name: getattr(self, field.name) for field in fields(SketchConfig)}
        return SketchConfig(**options | {"weight": self.filled().weight})

    def filled(self) -> "Choices":
        """The config's choices, completed by the preset's."""
        preset = PRESETS[self.preset]
        return Choices(
            self.method or preset.method,
            self.debias or preset.debias,
            self.center or preset.center,
            self.balance or preset.balance,
            self.weight or preset.weight,
        )
