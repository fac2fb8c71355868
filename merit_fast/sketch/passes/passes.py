"""A model's forward passes between taps: which weights are unfrozen, and what happens after."""

import functools
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_check import SketchCheck
from merit_fast.manifests.sketch_state import Weight
from merit_fast.sketch.capture.hooks import ModuleTaps
from merit_fast.sketch.capture.layout import Pass, Refusal, RepeatBatch, Site
from merit_fast.sketch.capture.taps import tap
from merit_fast.sketch.capture.towers import read_grid, uneven_images
from merit_fast.sketch.capture.trees import map_tensors, tensors_of
from merit_fast.sketch.capture.uses import UseAudit
from merit_fast.sketch.divided.arrivals import Arrivals, names_of_ids
from merit_fast.sketch.divided.lockstep import Lockstep
from merit_fast.sketch.divided.tensor_parallel import Slices
from merit_fast.sketch.divided.wrapping import submodule, wrap_forward
from merit_fast.sketch.passes import begin
from merit_fast.sketch.passes.current import CurrentPass
from merit_fast.sketch.passes.parts import Sketches, assign_parts
from merit_fast.sketch.passes.refusals import Uncovered
from merit_fast.sketch.passes.scale import output_names
from merit_fast.sketch.precondition import Preconditioner


class SketchedPasses:
    """Runs a model's forward pass between taps; ``GradientSketcher`` attaches it.

    On the first pass of every kind of call all chosen weights are unfrozen. Where the gradients of
    the model's outputs arrive, one more backward pass takes those of one example and compares its
    gradients with what the taps give; in the user's own pass follow the sums. A parameter that no
    tap covers, or whose taps are wrong, stays unfrozen: its sketches come from a backward pass per
    example, from the outputs to these parameters only.

    Attributes:
        part_of: parameter name -> its part of the model.
        packed: cu_seqlens of the next forward pass, if it is a packed row.
        uncovered: parameters with a backward pass per example.
        lockstep, slices: processes that have parts of the parameters.
        result: of the self-check; None: no pass was checked.
        max_side: of the ``FactorSums`` that every pass collects; None: none collects, all sketch.

    Raises:
        MeritFastError: a parameter cannot be covered.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        sketch: CountSketch,
        preconditioner: Preconditioner,
        parts: Mapping[str, str],
        check: Literal["first", "always", "never"],
        uncovered: Literal["autograd", "error"],
        weight: Weight,
    ) -> None:
        self.model = model
        self.weight = weight
        self.parameters = dict(parameters)
        self.sketch = sketch
        self.preconditioner = preconditioner
        self.parts = tuple(parts)
        self.part_of = assign_parts(parts, parameters)
        self.max_side: int | None = None
        self.check = check
        self.uncovered = Uncovered(model, self.parameters, uncovered)
        self.packed: Tensor | None = None
        self.result: SketchCheck | None = None
        self.now: CurrentPass | None = None
        self._names = names_of_ids(model, parameters)
        self.lockstep = Lockstep(parameters.items())
        self._arrivals = Arrivals(model, self._names, self._arrive)
        self.taps = ModuleTaps(model, self._names, self._refuse, self.uncovered.slow)
        self.taps.require_here = self._arrivals.require_here
        self.slices = Slices(model, self._names)
        self.taps.elsewhere = self.slices.elsewhere
        self._kinds: set[Hashable] = set()
        self._constant: set[str] = set()  # parameters that their modules use under no_grad only
        self._sizes = begin.sizes_of(model)
        self._undo: list[Callable[[], object]] = []
        self.uncovered.require_allowed()

    @property
    def run(self) -> Pass | None:
        return None if self.now is None else self.now.run

    @property
    def is_checking(self) -> bool:
        return self.now is not None and self.now.sums is not None

    def names_of_parts(self) -> dict[str, tuple[str, ...]]:
        """Part -> names of its parameters, in the model's order."""
        pairs = self.part_of.items()
        return {p: tuple(name for name, part in pairs if part == p) for p in self.parts}

    def attach(self) -> None:
        if "torch._dynamo" in sys.modules:  # what was compiled runs as it is written
            stance = torch.compiler.set_stance("force_eager")  # type: ignore[no-untyped-call]
            self._undo.append(functools.partial(stance.__exit__, None, None, None))
        self.taps.attach()
        self._undo.append(self.taps.detach)
        for name, tower in self.taps.towers.items():
            inside = [site for site in self.taps.sites if site.tower == name]
            owned = {name: name for site in inside for name in site.owned.values()}
            if owned:
                enter = functools.partial(self._enter_tower, Site(tower, owned, name))
                hook = tower.register_forward_pre_hook(enter, with_kwargs=True)
                self._undo.append(hook.remove)
        self._undo.append(wrap_forward(self.model, self._forward_model))
        self._undo.extend(self._arrivals.attach())

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.discard()

    def discard(self) -> None:
        if self.now is not None:
            self.now.end()
            self._arrivals.forget()
        self.now = None
        self.taps.run = None

    def take(
        self,
        row_examples: Sequence[int] | None = None,
        num_target_tokens: Sequence[int] = (),
    ) -> Sketches:
        """Ends the pass; returns its sketches.

        Args:
            row_examples: example of each row, for the scale of the loss; None: each row is one.
            num_target_tokens: [B] of the examples; empty: not known.

        Raises:
            RepeatBatch: the check has found wrong parameters, which are uncovered from now on.
            MeritFastError: the check has failed, or the loss is a mean over the batch.
        """
        with self.lockstep.together(RepeatBatch):
            return self._take(row_examples, num_target_tokens)

    def _take(
        self, row_examples: Sequence[int] | None, num_target_tokens: Sequence[int]
    ) -> Sketches:
        now = self.now
        assert now is not None
        run = now.run
        self.discard()
        if now.deferred is not None:
            raise now.deferred
        if run.is_divided and self.uncovered.slow and not now.gated:
            self.uncovered.need_rows("the model's outputs got no gradient")
        unseen = run.ran_without_grad - self.uncovered.slow.keys()
        self._constant |= unseen & now.without_gradient()
        if unseen - self._constant:
            raise MeritFastError(
                f"sketch_gradients: parameter {min(unseen - self._constant)} was used under "
                "no_grad and never again: with reentrant checkpointing give use_reentrant=False; "
                "else leave it out"
            )
        sketches = Sketches.of(run, self.parts).summed(self.slices)
        now.scale.check(row_examples, self.weight, num_target_tokens)
        found = now.check_sums(sketches.whole)
        if found is not None:
            self.result = found if self.result is None else self.result.merged(found)
        if found is not None or now.sums is None:
            self._kinds.add(now.kind)
        return sketches

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
        now = self.now = self._begin(args, kwargs)
        try:
            self.taps.run = now.run
            self._check_images(now.run, args, kwargs)
            now.unfreeze(self._wanted(now))
            self._arrivals.unfreeze()
            if now.run.exploring:
                with UseAudit(self._names, self.taps.covered) as audit:
                    output = original(*args, **kwargs)
                for name, function in audit.stray.items():
                    self.uncovered.add_stray(name, function)
                now.agree()
            else:
                output = original(*args, **kwargs)
            self.uncovered.require_allowed()
        except BaseException:
            self.discard()
            raise
        now.run.open = False
        now.reentrant = bool(now.run.ran_without_grad)
        return self._gate(now, output)

    def _begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> CurrentPass:
        cu_seqlens = kwargs.get("cu_seq_lens_q") if self.packed is None else self.packed
        self.packed = None
        source = begin.source_of(args, kwargs)
        run = begin.begin_pass(self.sketch, self.preconditioner, self.part_of, source, cu_seqlens)
        kind = begin.kind_of_call(self.model, run, self._sizes, args, kwargs)
        states = self.lockstep.exchange((kind not in self._kinds, run.size))
        run.exploring = any(is_new for is_new, _ in states)
        run.trusts_check = self.check != "never"
        now = CurrentPass(run, kind, self.parameters, self.uncovered, self.taps.anchor)
        now.lockstep, now.slices = self.lockstep, self.slices
        if self.lockstep.is_divided:
            now.most_examples = max(size for _, size in states)
            now.agree()
        device = begin.source_of(args, kwargs).device.type
        now.autocast = torch.is_autocast_enabled(device)
        if self.check == "always" or (self.check == "first" and run.exploring):
            now.compare()
        if self.max_side is not None:
            begin.collect_moments(run, self.parameters, self.max_side, now.sums is not None)
        return now

    def _arrive(self, name: str, form: nn.Parameter) -> bool:
        now = self.now
        return now is not None and now.weights is not None and now.weights.arrive(name, form)

    def _wanted(self, now: CurrentPass) -> dict[str, nn.Parameter]:
        """Parameters that have to be unfrozen in this pass."""
        may_refuse = now.run.exploring and self.uncovered.policy == "autograd"
        if now.sums is not None or may_refuse:
            return self.parameters
        return {name: self.parameters[name] for name in self.uncovered.slow}

    def _check_images(self, run: Pass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Refuses the parameters outside the decoder where images have no rows of examples."""
        pixels = kwargs.get("pixel_values")
        is_source = pixels is begin.source_of(args, kwargs)
        if self.taps.towers or run.size == 1 or is_source or not isinstance(pixels, Tensor):
            return
        known: set[int] = set()
        for getter in ("get_decoder", "get_output_embeddings"):
            part = submodule(self.model, getter)
            if part is not None:
                known.update(id(parameter) for parameter in part.parameters())
        outside = {n: n for n, p in self.parameters.items() if id(p) not in known}
        reason = uneven_images(run, getattr(self.model, "config", None), pixels)
        if reason is not None and not outside.keys() <= self.uncovered.slow.keys():
            self.uncovered.add(Site(self.model, outside).refusal(reason))
            self.uncovered.require_allowed()

    def _gate(self, now: CurrentPass, output: Any) -> Any:
        """Lets the pass see the gradients of the model's outputs."""
        if now.weights is None:
            return output
        inner = {id(value): value for value in tensors_of(output) if value.requires_grad}
        if not inner:
            return output
        values = list(inner.values())
        names = output_names(output)
        now.names = [names[key] for key in inner]

        def sink(dys: tuple[Tensor | None, ...]) -> None:
            with now.deferring():
                now.at_outputs(self.model, values, dys)

        gated = dict(zip(inner, tap(self.taps.anchor, values, sink), strict=True))
        return map_tensors(output, lambda value: gated.get(id(value), value))

    def _refuse(self, refusal: Refusal) -> None:
        """Notes parameters that no tap covers.

        Raises:
            RepeatBatch: it is too late for a backward pass per example of this batch.
        """
        self.uncovered.add(refusal)
        now = self.now
        if now is not None and (now.run.is_late or not now.run.exploring):
            with now.deferring():
                self.uncovered.require_allowed()
                self.uncovered.repeat(refusal.site.name)

    def _enter_tower(
        self, site: Site, tower: nn.Module, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        run = self.run
        live = site.without(self.uncovered.slow)
        if run is not None and run.open and run.size > 1 and live.owned:
            try:
                read_grid(run, live, tower, getattr(self.model, "config", None), args, kwargs)
            except Refusal as refusal:
                self._refuse(refusal)
