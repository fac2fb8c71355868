"""One pass at the model's outputs: the rows of one example or of each, and the comparisons."""

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.manifests.sketch_check import SketchCheck
from merit_fast.sketch.capture.layout import Pass, Refusal, Site
from merit_fast.sketch.capture.taps import ExtraPass, entered, extra_pass, masked
from merit_fast.sketch.passes.check import (
    Comparison,
    Tolerance,
    relative_error,
    tolerance_of,
    wrong_parameters,
)
from merit_fast.sketch.passes.refusals import Uncovered
from merit_fast.sketch.passes.scale import LossScale, refuse_mixed
from merit_fast.sketch.passes.unfrozen import UnfrozenWeights

_NO_ROWS = "the sum only; one example too in batches of one: the model returns no row per example"


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

    def depend_on(self, example: int) -> bool:
        """Whether the losses depend on an example's part of the outputs."""
        pairs = zip(self.dys, self.parts, strict=True)
        return any(bool(dy[part[example]].any()) for dy, part in pairs)

    def of_example(self, example: int) -> list[Tensor]:
        """The gradients of one example's losses."""
        pairs = zip(self.dys, self.parts, strict=True)
        return [dy if len(part) == 1 else masked(dy, part[example]) for dy, part in pairs]


@dataclass
class CurrentPass:
    """The forward pass whose sketches are not taken yet.

    Attributes:
        parameters: all that are sketched, by name.
        uncovered: those that no tap covers.
        anchor: a leaf through which every tap is reached.
        weights: those that are unfrozen now.
        row, sums: comparisons of one example and of the sum, where the pass is checked.
        example: the one whose gradient was compared.
        note: why none was.
        gated: a gradient has arrived at the model's outputs.
        received: parameters that have got a gradient from autograd.
        names: of the model's outputs that can get a gradient.
        scale: weights of the tokens in the loss, where the pass is checked.
        reentrant: modules ran without gradients first, as reentrant checkpointing lets them.
        autocast: the forward pass runs under autocast.
    """

    run: Pass
    kind: Hashable
    parameters: Mapping[str, nn.Parameter]
    uncovered: Uncovered
    anchor: Tensor
    weights: UnfrozenWeights | None = None
    row: Comparison | None = None
    sums: Comparison | None = None
    example: int | None = None
    note: str = ""
    gated: bool = False
    received: set[str] = field(default_factory=set)
    reentrant: bool = False
    names: list[str] = field(default_factory=list)
    scale: LossScale = field(default_factory=LossScale)
    autocast: bool = False

    def compare(self) -> None:
        """Lets the pass be checked."""
        self.row = Comparison.of(self.run)
        self.sums = Comparison.of(self.run)
        self.run.also.append(self.sums.taps)

    def unfreeze(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if parameters:
            self.weights = UnfrozenWeights(parameters, self._receive)

    def without_gradient(self) -> set[str]:
        """Parameters to which autograd gave no gradient; none if it was not asked for all."""
        if self.weights is None or len(self.weights.parameters) < len(self.parameters):
            return set()
        return set(self.parameters) - self.received

    def end(self) -> None:
        self.run.done = True
        if self.weights is not None:
            self.weights.freeze()

    def at_outputs(
        self, model: nn.Module, outputs: Sequence[Tensor], dys: Sequence[Tensor | None]
    ) -> None:
        """Takes the rows that need backward passes of their own, where the gradients arrive."""
        run = self.run
        if extra_pass() is not None or run.done:
            return
        self.gated = True
        arrived = [i for i, dy in enumerate(dys) if dy is not None]
        for i in arrived:
            refuse_mixed(self.names[i], outputs[i], run.size)
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
        site = Site(model, {"": "of the output"})
        try:
            parts = [run.parts(site, dy) for _, dy in pairs]
        except Refusal as refusal:
            self.note = _NO_ROWS
            if self.uncovered.slow and run.is_divided:
                self.uncovered.need_rows(f"the model's output {refusal.reason}")
        else:
            found = OutputGradients([y for y, _ in pairs], [dy for _, dy in pairs], parts)
            if self.row is not None:
                for i, (y, dy), part in zip(arrived, pairs, parts, strict=True):
                    self.scale.add(i, y, dy, part)
                self._check_row(self.row, found)
            if run.is_divided:
                self._sketch_slow(found)
        run.is_late = True

    def _check_row(self, row: Comparison, found: OutputGradients) -> None:
        """Compares the last example that has a gradient."""
        examples = reversed(range(self.run.size)) if self.example is None else [self.example]
        example = next((b for b in examples if found.depend_on(b)), None)
        if example is None:
            return
        self.example = example
        kept = row.total
        row.clear()
        extra = ExtraPass(self.run, row.taps, row.receive)
        self._backward(extra, found, example, [*self.parameters.values(), self.anchor])
        slow = self.uncovered.slow
        errors = {n: error for n, error in row.errors(example).items() if n not in slow}
        tolerance = self._tolerance(found.dys[0], 1)
        wrong, _ = wrong_parameters(errors, tolerance, self._noise(row))
        self.uncovered.add_wrong(wrong, "the sketch of one example")
        self.uncovered.require_allowed()
        if kept is not None and row.total is not None:
            row.total += kept

    def _sketch_slow(self, found: OutputGradients) -> None:
        """Sketches the gradients of the uncovered parameters, example by example."""
        wanted: list[Tensor] = [self.parameters[name] for name in self.uncovered.slow]
        for example in range(self.run.size) if wanted else ():
            if found.depend_on(example):
                receive = functools.partial(self._receive_slow, example)
                self._backward(ExtraPass(self.run, None, receive), found, example, wanted)

    def _backward(
        self, extra: ExtraPass, found: OutputGradients, example: int, wanted: list[Tensor]
    ) -> None:
        """Runs the backward pass of one example's losses to ``wanted``, whose hooks get theirs."""
        # Reentrant checkpointing cannot end a pass at chosen inputs.
        ends: dict[str, Any] = {} if self.reentrant else {"inputs": wanted}
        dys = found.of_example(example)
        with entered(extra):
            torch.autograd.backward(found.outputs, dys, retain_graph=True, **ends)

    def _receive(self, name: str, gradient: Tensor) -> None:
        """Gets the gradient of an unfrozen parameter in any backward pass."""
        extra = extra_pass()
        if extra is not None:
            if extra.run is self.run and extra.receive is not None:
                extra.receive(name, gradient)
        elif not self.run.done:
            self.received.add(name)
            if self.sums is not None:
                self.sums.receive(name, gradient)
            if not self.run.is_divided:
                self._receive_slow(0, name, gradient)

    def _receive_slow(self, example: int, name: str, gradient: Tensor) -> None:
        if name in self.uncovered.slow:
            self.run.fired = True
            for target in (self.run, *self.run.also):
                target.add(name, example, gradient)

    def check_sums(self, sketches: Tensor) -> SketchCheck | None:
        """Compares the sketches [B, D] of the whole pass.

        Returns:
            The errors; None if the pass is not checked, or its gradient is not finite.

        Raises:
            MeritFastError: they are not autograd's.
        """
        total = None if self.sums is None else self.sums.total
        if self.sums is None or (total is not None and not bool(total.isfinite().all())):
            return None
        tolerance = self._tolerance(sketches, self.run.size)
        noise = self._noise(self.sums)
        wrong, _ = wrong_parameters(self.sums.errors(None), tolerance, noise)
        for name in wrong:
            if name in self.uncovered.slow:
                raise MeritFastError(
                    f"sketch_gradients: check: parameter {name} has a gradient of the summed "
                    "losses that does not pass through the model's outputs"
                )
        if wrong:
            self.uncovered.add_wrong(wrong, "the sum of the examples' sketches")
            self.uncovered.require_allowed()
            self.uncovered.repeat(next(iter(wrong)))
        sum_error = relative_error(sketches.sum(0, keepdim=True), total)
        row_error = None
        if self.example is not None and self.row is not None:
            row_error = relative_error(sketches[self.example : self.example + 1], self.row.total)
        for comparison, error, what in (
            (self.sums, sum_error, "the sum of the"),
            (self.row, row_error or 0.0, "one of the"),
        ):
            if not error <= 2 * self._bound(comparison, tolerance):
                raise MeritFastError(
                    f"sketch_gradients: check: {what} sketches differs from autograd by {error:.2g}"
                )
        return SketchCheck(row_error, sum_error, 1, self.note)

    @staticmethod
    def _noise(comparison: Comparison) -> dict[str, float]:
        return comparison.noise() if comparison.whole.preconditioner.kind else {}

    def _bound(self, comparison: Comparison | None, tolerance: Tolerance) -> float:
        """Largest relative error of all parameters together that rounding explains."""
        if comparison is None or comparison.total is None:
            return tolerance.whole
        scale = float(comparison.total.norm()) or 1.0
        noise = math.hypot(*self._noise(comparison).values())
        return tolerance.whole + tolerance.floor * noise / scale

    def _tolerance(self, value: Tensor, examples: int) -> Tolerance:
        tokens = self.run.tokens if self.run.cu_seqlens is not None else self.run.tokens * examples
        return tolerance_of(self.parameters.values(), value, tokens, self.autocast)
