"""One pass at the model's outputs: the rows of one example or of each, and the comparisons."""

import functools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.manifests.sketch_check import SketchCheck
from merit_fast.sketch.capture.layout import Pass, Refusal
from merit_fast.sketch.capture.taps import ExtraPass, entered, extra_pass
from merit_fast.sketch.divided.lockstep import Lockstep
from merit_fast.sketch.divided.tensor_parallel import Slices
from merit_fast.sketch.passes.check import (
    Comparison,
    Tolerance,
    relative_error,
    tolerance_of,
    wrong_parameters,
)
from merit_fast.sketch.passes.outputs import OutputGradients
from merit_fast.sketch.passes.refusals import Uncovered
from merit_fast.sketch.passes.scale import LossScale, refuse_mixed
from merit_fast.sketch.passes.unfrozen import UnfrozenWeights

_NO_ROWS = "the sum only; one example too in batches of one: the model returns no row per example"


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
        lockstep: the processes that must run the same backward passes.
        most_examples: of a process's pass, among these.
        slices: the processes that have slices of the parameters.
        deferred: an error of the backward pass, which ends first where others take part in it.
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
    lockstep: Lockstep = field(default_factory=lambda: Lockstep(()))
    most_examples: int = 0
    slices: Slices = field(default_factory=lambda: Slices(nn.Module(), {}))
    deferred: MeritFastError | None = None

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Keeps the first error until the pass has ended, where other processes take part."""
        try:
            yield
        except MeritFastError as error:
            if not self.lockstep.is_divided:
                raise
            self.deferred = self.deferred or error

    def compare(self) -> None:
        """Lets the pass be checked."""
        self.row = Comparison.of(self.run, self.slices)
        self.sums = Comparison.of(self.run, self.slices)
        self.run.also.append(self.sums.taps)

    def unfreeze(self, parameters: Mapping[str, nn.Parameter]) -> None:
        if parameters:
            self.weights = UnfrozenWeights(parameters, self._receive, self.slices.is_divided)

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
        with self.deferring():
            for i in arrived:
                refuse_mixed(self.names[i], outputs[i], run.size)
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
        with self.deferring():
            found = self._divided(model, pairs)
        if self.row is not None:
            with self.deferring():
                if found is not None:
                    for i, (y, dy), part in zip(arrived, pairs, found.parts, strict=True):
                        self.scale.add(i, y, dy, part)
                self._check_row(self.row, pairs, found)
            self.agree()
        if run.is_divided or self.most_examples > 1:
            self._sketch_slow(pairs, found)
        run.is_late = True

    def agree(self) -> None:
        """Lets all processes know of all parameters with a backward pass per example."""
        for slow in self.lockstep.exchange(self.uncovered.slow):
            self.uncovered.slow.update(slow)

    def _divided(
        self, model: nn.Module, pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> OutputGradients | None:
        """Output gradients by example; None if the outputs have no rows of examples."""
        try:
            return OutputGradients.of(self.run, model, pairs)
        except Refusal as refusal:
            self.note = _NO_ROWS
            if self.uncovered.slow and self.run.is_divided:
                self.uncovered.need_rows(f"the model's output {refusal.reason}")
            return None

    def _check_row(
        self,
        row: Comparison,
        pairs: Sequence[tuple[Tensor, Tensor]],
        found: OutputGradients | None,
    ) -> None:
        """Compares the last example that has a gradient."""
        wanted = [*self._forms(self.parameters), self.anchor]
        example = None
        if found is not None:
            examples = reversed(range(self.run.size)) if self.example is None else [self.example]
            example = next((b for b in examples if found.depend_on(b)), None)
        if found is None or example is None:
            self._join(pairs, wanted)
            return
        self.example = example
        kept = row.total
        row.clear()
        extra = ExtraPass(self.run, row.taps, row.receive)
        self._backward(extra, found, example, wanted)
        slow = self.uncovered.slow
        errors = {n: error for n, error in row.errors(example).items() if n not in slow}
        tolerance = self._tolerance(found.dys[0], 1)
        wrong, _ = wrong_parameters(errors, tolerance, self._noise(row))
        self.uncovered.add_wrong(wrong, "the sketch of one example")
        self.uncovered.require_allowed()
        if kept is not None and row.total is not None:
            row.total += kept

    def _sketch_slow(
        self, pairs: Sequence[tuple[Tensor, Tensor]], found: OutputGradients | None
    ) -> None:
        """Sketches the gradients of the uncovered parameters, example by example."""
        wanted = self._forms(self.uncovered.slow)
        size = self.run.size if self.run.is_divided else 0
        for example in range(max(size, self.most_examples)) if wanted else ():
            if found is not None and example < size and found.depend_on(example):
                receive = functools.partial(self._receive_slow, example)
                self._backward(ExtraPass(self.run, None, receive), found, example, wanted)
            else:
                self._join(pairs, wanted)

    def _join(self, pairs: Sequence[tuple[Tensor, Tensor]], wanted: list[Tensor]) -> None:
        """Runs a backward pass for the other processes only, which gather parameters in theirs."""
        if self.lockstep.is_divided:
            outputs = [y for y, _ in pairs]
            whole = OutputGradients(outputs, [dy for _, dy in pairs], [[(...,)]] * len(pairs))
            self._backward(ExtraPass(self.run), whole, 0, wanted)

    def _forms(self, names: Collection[str]) -> list[Tensor]:
        return [] if self.weights is None else self.weights.forms(names)

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
        forms = self._forms(self.parameters)
        return tolerance_of(forms, value, tokens, self.autocast)
