"""One forward pass and its backward passes: what taps cover, what does not, and the self-check."""

import functools
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.sketch.capture.begin import begin_pass, kind_of_call, sizes_of, source_of
from merit_fast.sketch.capture.check import (
    CheckResult,
    Comparison,
    relative_error,
    tolerance_of,
    wrong_parameters,
)
from merit_fast.sketch.capture.hooks import ModuleTaps
from merit_fast.sketch.capture.layout import Pass, Refusal, RepeatBatch, Site
from merit_fast.sketch.capture.refusals import list_refused
from merit_fast.sketch.capture.taps import ExtraPass, entered, extra_pass, masked, tap
from merit_fast.sketch.capture.towers import read_grid, uneven_images
from merit_fast.sketch.capture.trees import map_tensors, tensors_of
from merit_fast.sketch.capture.unfrozen import UnfrozenWeights
from merit_fast.sketch.capture.uses import UseAudit
from merit_fast.sketch.capture.wrapping import submodule, wrap_forward

Pairs = list[tuple[Tensor, Tensor]]  # outputs of the model and their gradients
Parts = list[list[tuple[Any, ...]]]  # of each, the index of every example's part


@dataclass
class Current:
    """The forward pass whose sketches are not taken yet.

    Attributes:
        row: comparison of one example, where the pass is checked.
        sums: comparison of the sum over examples.
        example: the one whose gradient was compared.
        note: why none was.
        gated: a gradient has arrived at the model's outputs.
        reentrant: modules ran without gradients first, as reentrant checkpointing lets them.
    """

    run: Pass
    kind: Hashable
    weights: UnfrozenWeights | None = None
    row: Comparison | None = None
    sums: Comparison | None = None
    example: int | None = None
    note: str = ""
    gated: bool = False
    reentrant: bool = False


class SketchedPasses:
    """Runs a model's forward pass between taps; ``GradientSketcher`` attaches it.

    On the first pass of every kind of call all chosen weights are unfrozen. Where the gradients of
    the model's outputs arrive, one more backward pass takes those of one example and compares its
    gradients with what the taps give; in the user's own pass follow the sums. A parameter that no
    tap covers, or whose taps are wrong, stays unfrozen: its sketches come from a backward pass per
    example, from the outputs to these parameters only.

    Attributes:
        packed: cu_seqlens of the next forward pass, if it is a packed row.
        slow: parameters with a backward pass per example -> reason.
        result: of the self-check; None: no pass was checked.

    Raises:
        MeritFastError: a parameter cannot be covered.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sketch: CountSketch,
        scales: Mapping[str, Tensor],
        check: Literal["first", "always", "never"],
        uncovered: Literal["autograd", "error"],
    ) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.sketch = sketch
        self.scales = scales
        self.check = check
        self.uncovered = uncovered
        self.packed: Tensor | None = None
        self.slow: dict[str, str] = {}
        self.result: CheckResult | None = None
        self.now: Current | None = None
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.taps = ModuleTaps(model, names, self._refuse, self.slow)
        self._kinds: set[Hashable] = set()
        self._sizes = sizes_of(model)
        self._undo: list[Callable[[], object]] = []
        self._raise_refused()

    @property
    def run(self) -> Pass | None:
        return None if self.now is None else self.now.run

    @property
    def is_checking(self) -> bool:
        return self.now is not None and self.now.sums is not None

    def attach(self) -> None:
        if "torch._dynamo" in sys.modules:  # what was compiled runs as it is written
            stance = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]
            self._undo.append(functools.partial(stance.__exit__, None, None, None))
        self.taps.attach()
        self._undo.append(self.taps.detach)
        for name, tower in self.taps.towers.items():
            inside = [site for site in self.taps.sites if site.tower == name]
            if inside:
                owned = {name: name for site in inside for name in site.owned.values()}
                hook = tower.register_forward_pre_hook(
                    functools.partial(self._enter_tower, Site(tower, owned, name)),
                    with_kwargs=True,
                )
                self._undo.append(hook.remove)
        self._undo.append(wrap_forward(self.model, self._forward_model))

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.discard()

    def discard(self) -> None:
        if self.now is not None:
            self.now.run.done = True
            if self.now.weights is not None:
                self.now.weights.freeze()
        self.now = None
        self.taps.run = None

    def take(self) -> Tensor:
        """Ends the pass; returns its sketches [B, D] float32.

        Raises:
            RepeatBatch: the check has found wrong parameters, which are ``slow`` from now on.
            MeritFastError: the check has failed.
        """
        now = self.now
        assert now is not None
        run = now.run
        self.discard()
        if run.is_divided and self.slow and not now.gated:
            self._no_rows("the model's outputs got no gradient")
        first, *others = run.outs.values() or [torch.zeros(run.size, self.sketch.proj_dim)]
        for out in others:
            first += out.to(first.device)
        if now.sums is not None:
            self._check_sums(now, now.sums, first)
        self._kinds.add(now.kind)
        return first

    def _forward_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        graph_task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        recomputing = self.now is not None and graph_task != -1
        if not torch.is_grad_enabled() or recomputing:
            return original(*args, **kwargs)
        if self.now is not None:
            raise MeritFastError(
                "sketch_gradients: a second forward pass before update(): call update() or "
                "discard() first, and run passes that are not sketched under torch.no_grad()"
            )
        now = self._begin(args, kwargs)
        try:
            if now.run.exploring:
                output = self._audited_call(original, *args, **kwargs)
            else:
                output = original(*args, **kwargs)
            self._raise_refused()
        except BaseException:
            self.discard()
            raise
        now.run.open = False
        now.reentrant = bool(now.run.ran_without_grad)
        return self._gate(now, output)

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Current:
        source = source_of(args, kwargs)
        cu_seqlens = kwargs.get("cu_seq_lens_q") if self.packed is None else self.packed
        self.packed = None
        run = begin_pass(self.sketch, self.scales, source, cu_seqlens)
        kind = kind_of_call(self.model, run, self._sizes, args, kwargs)
        run.exploring = kind not in self._kinds
        now = self.now = Current(run, kind)
        self.taps.run = run
        checked = self.check == "always" or (self.check == "first" and run.exploring)
        if checked:
            now.row = Comparison.of(run)
            now.sums = Comparison.of(run)
            run.also.append(now.sums.taps)
        try:
            self._check_images(run, source, kwargs.get("pixel_values"))
        except BaseException:
            self.discard()
            raise
        everything = checked or (run.exploring and self.uncovered == "autograd")
        wanted = self.parameters if everything else {n: self.parameters[n] for n in self.slow}
        if wanted:
            now.weights = UnfrozenWeights(wanted, functools.partial(self._receive, now))
        return now

    def _check_images(self, run: Pass, source: Tensor, pixels: Any) -> None:
        if self.taps.towers or run.size == 1 or not isinstance(pixels, Tensor) or pixels is source:
            return
        known: set[int] = set()
        for getter in ("get_decoder", "get_output_embeddings"):
            part = submodule(self.model, getter)
            if part is not None:
                known.update(id(parameter) for parameter in part.parameters())
        outside = {n: n for n, p in self.parameters.items() if id(p) not in known}
        reason = uneven_images(run, getattr(self.model, "config", None), pixels)
        if reason is not None and not outside.keys() <= self.slow.keys():
            self._refuse(Site(self.model, outside).refusal(reason))
            self._raise_refused()

    def _audited_call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Watches the first pass of a kind for uses of parameters that no module is known for."""
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        audit = UseAudit(names, self.taps.covered)
        with audit:
            output = original(*args, **kwargs)
        for name, function in audit.stray.items():
            self.slow.setdefault(name, f"is used outside its module's forward, in {function}")
        return output

    def _gate(self, now: Current, output: Any) -> Any:
        """Lets ``_at_outputs`` see the gradients of the model's outputs."""
        if now.weights is None:
            return output
        inner = {id(value): value for value in tensors_of(output) if value.requires_grad}
        if not inner:
            return output
        values = list(inner.values())
        sink = functools.partial(self._at_outputs, now, values)
        gated = dict(zip(inner, tap(self.taps.anchor, values, sink), strict=True))
        return map_tensors(output, lambda value: gated.get(id(value), value))

    def _at_outputs(
        self, now: Current, outputs: Sequence[Tensor], dys: Sequence[Tensor | None]
    ) -> None:
        if extra_pass() is not None or now.run.done:
            return
        now.gated = True
        pairs = [(y, dy) for y, dy in zip(outputs, dys, strict=True) if dy is not None]
        site = Site(self.model, {"": "of the output"})
        parts: Parts | None
        try:
            parts = [now.run.parts(site, dy) for _, dy in pairs]
        except Refusal as refusal:
            parts = None
            now.note = "one example only with batches of one: the model returns no row per example"
            if self.slow and now.run.is_divided:
                self._no_rows(f"the model's output {refusal.reason}")
        if parts is not None:
            if now.row is not None:
                self._check_row(now, now.row, pairs, parts)
            if now.run.is_divided:
                self._slow_rows(now, pairs, parts)
        now.run.exploring = False

    def _check_row(self, now: Current, row: Comparison, pairs: Pairs, parts: Parts) -> None:
        """Compares the last example that has a gradient."""
        run = now.run
        example = now.example
        if example is None:
            example = next((b for b in reversed(range(run.size)) if _counts(pairs, parts, b)), None)
        if example is None:
            return
        now.example = example
        tensors = [y for y, _ in pairs]
        grads = _of_example(run, pairs, parts, example)
        kept = row.total
        row.clear()
        extra = ExtraPass(run, row.taps, row.receive)
        self._backward(now, extra, tensors, grads, [*self.parameters.values(), self.taps.anchor])
        errors = {n: e for n, e in row.errors(example).items() if n not in self.slow}
        wrong, _ = wrong_parameters(errors, self._tolerance(pairs[0][0]))
        self._refuse_wrong(wrong, "the sketch of one example")
        self._raise_refused()
        if kept is not None and row.total is not None:
            row.total += kept

    def _slow_rows(self, now: Current, pairs: Pairs, parts: Parts) -> None:
        """Sketches the gradients of the slow parameters, example by example."""
        run = now.run
        wanted = [self.parameters[name] for name in self.slow]
        if not wanted:
            return
        for example in range(run.size):
            if _counts(pairs, parts, example):
                receive = functools.partial(self._receive_slow, run, example)
                grads = _of_example(run, pairs, parts, example)
                tensors = [y for y, _ in pairs]
                self._backward(now, ExtraPass(run, None, receive), tensors, grads, wanted)

    def _receive_slow(self, run: Pass, example: int, name: str, gradient: Tensor) -> None:
        if name in self.slow:
            run.fired = True
            for target in (run, *run.also):
                target.add(name, example, gradient)

    def _receive(self, now: Current, name: str, gradient: Tensor) -> None:
        """Gets the gradient of an unfrozen parameter in any backward pass."""
        run = now.run
        extra = extra_pass()
        if extra is not None:
            if extra.run is run and extra.receive is not None:
                extra.receive(name, gradient)
        elif not run.done:
            if now.sums is not None:
                now.sums.receive(name, gradient)
            if not run.is_divided:
                self._receive_slow(run, 0, name, gradient)

    def _backward(
        self,
        now: Current,
        extra: ExtraPass,
        tensors: list[Tensor],
        grads: list[Tensor],
        wanted: list[Tensor],
    ) -> None:
        """Runs a backward pass to ``wanted``, whose hooks get the gradients."""
        # Reentrant checkpointing cannot end a pass at chosen inputs.
        ends = {} if now.reentrant else {"inputs": wanted}
        with entered(extra):
            torch.autograd.backward(tensors, grads, retain_graph=True, **ends)

    def _check_sums(self, now: Current, sums: Comparison, sketches: Tensor) -> None:
        tolerance = self._tolerance(sketches)
        errors = sums.errors(None)
        wrong, _ = wrong_parameters(errors, tolerance)
        for name in wrong:
            if name in self.slow:
                raise MeritFastError(
                    f"sketch_gradients: check: parameter {name} has a gradient of the summed "
                    "losses that does not pass through the model's outputs"
                )
        if wrong:
            self._refuse_wrong(wrong, "the sum of the examples' sketches")
            self._raise_refused()
            raise self._repeat(next(iter(wrong)))
        sum_error = relative_error(sketches.sum(0, keepdim=True), sums.total)
        row_error = None
        if now.example is not None and now.row is not None:
            chosen = sketches[now.example : now.example + 1]
            row_error = relative_error(chosen, now.row.total)
        for error, what in ((sum_error, "the sum of the"), (row_error or 0.0, "one of the")):
            if not error <= 2 * tolerance.whole:
                raise MeritFastError(
                    f"sketch_gradients: check: {what} sketches differs from autograd by {error:.2g}"
                )
        result = self.result or CheckResult(None, 0.0, 0)
        self.result = result.with_call(row_error, sum_error, now.note)

    def _tolerance(self, value: Tensor) -> Any:
        dtypes = {parameter.dtype for parameter in self.parameters.values()}
        return tolerance_of(dtypes | {value.dtype}, value.device.type)

    def _refuse_wrong(self, wrong: Mapping[str, float], what: str) -> None:
        for name, error in wrong.items():
            reason = f"fails the check: {what} differs from autograd by {error:.2g}"
            self.slow.setdefault(name, f"of {self._class_of(name)} {reason}")

    def _refuse(self, refusal: Refusal) -> None:
        """Notes parameters that no tap covers.

        Raises:
            RepeatBatch: it is too late for a backward pass per example of this batch.
        """
        names = list(refusal.site.owned.values())
        for name in names:
            self.slow.setdefault(name, f"of {self._class_of(name)} {refusal.reason}")
        run = self.run
        if run is None or run.exploring:
            return
        self._raise_refused()
        raise self._repeat(names[0])

    def _repeat(self, name: str) -> RepeatBatch:
        return RepeatBatch(
            f"sketch_gradients: parameter {name} {self.slow[name]}: it takes a backward pass per "
            "example from now on; run this batch again"
        )

    def _class_of(self, name: str) -> str:
        """Class of the first module that owns a parameter."""
        for module in self.model.modules():
            owned = module.parameters(recurse=False)
            if any(parameter is self.parameters[name] for parameter in owned):
                return type(module).__name__
        return type(self.model).__name__

    def _raise_refused(self) -> None:
        if self.slow and self.uncovered == "error":
            message = list_refused(self.slow, self.parameters)
            self.slow.clear()
            raise MeritFastError(message)

    def _no_rows(self, reason: str) -> None:
        name, why = next(iter(self.slow.items()))
        raise MeritFastError(
            f"sketch_gradients: parameter {name} {why}, and {reason}: give batches of one example, "
            "or leave it out"
        )

    def _enter_tower(
        self, site: Site, tower: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        run = self.run
        live = site.without(self.slow)
        if run is not None and run.open and run.size > 1 and live.owned:
            try:
                read_grid(run, live, tower, getattr(self.model, "config", None), args, kwargs)
            except Refusal as refusal:
                self._refuse(refusal)


def _counts(pairs: Pairs, parts: Parts, example: int) -> bool:
    """Whether the losses depend on an example's part of the outputs."""
    return any(bool(dy[part[example]].any()) for (_, dy), part in zip(pairs, parts, strict=True))


def _of_example(run: Pass, pairs: Pairs, parts: Parts, example: int) -> list[Tensor]:
    """Gradients of the outputs of one example's losses."""
    if not run.is_divided:
        return [dy for _, dy in pairs]
    return [masked(dy, part[example]) for (_, dy), part in zip(pairs, parts, strict=True)]
