"""Outputs of a model and their gradients, by example."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from merit_fast.sketch.capture.layout import Pass, Site
from merit_fast.sketch.capture.taps import masked


@dataclass(frozen=True)
class OutputGradients:
    """Outputs of the model that have got a gradient.

    Attributes:
        outputs, dys: each output and its gradient.
        parts: of each, the index of every example's part.
    """

    outputs: list[Tensor]
    dys: list[Tensor]
    parts: list[list[tuple[Any, ...]]]

    @classmethod
    def of(
        cls, run: Pass, model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> "OutputGradients":
        """Divides pairs of an output and its gradient among the examples of a pass.

        Raises:
            Refusal: rows cannot be told apart by example.
        """
        site = Site(model, {"": "of the output"})
        parts = [run.parts(site, dy) for _, dy in pairs]
        return cls([y for y, _ in pairs], [dy for _, dy in pairs], parts)

    def depend_on(self, example: int) -> bool:
        """Whether the losses depend on an example's part of the outputs."""
        pairs = zip(self.dys, self.parts, strict=True)
        return any(bool(dy[part[example]].any()) for dy, part in pairs)

    def of_example(self, example: int) -> list[Tensor]:
        """The gradients of one example's losses."""
        pairs = zip(self.dys, self.parts, strict=True)
        return [dy if len(part) == 1 else masked(dy, part[example]) for dy, part in pairs]
