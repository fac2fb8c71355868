"""The sketcher of per-example gradients: hooks on a model, and the states that they fill."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from merit_fast.errors import MeritFastError
from merit_fast.kernels.sketch import CountSketch
from merit_fast.manifests.sketch_check import SketchCheck
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState, Weight
from merit_fast.sketch.divided.freezing import freeze_weights, is_trainable, reshard
from merit_fast.sketch.divided.refusals import require_known
from merit_fast.sketch.divided.sums import summed_states
from merit_fast.sketch.examples import DatasetId, UpdatedExamples, require_finite
from merit_fast.sketch.names import canonical_name
from merit_fast.sketch.passes.parts import Sketches
from merit_fast.sketch.passes.passes import SketchedPasses
from merit_fast.sketch.precondition import FactorSums, KfacFactors, Preconditioner
from merit_fast.sketch.selection import (
    model_weights_fingerprint,
    require_one_of,
    select_parameters,
    unwrapped,
)

States = dict[DatasetId, SketchState]


class GradientSketcher:
    """Sketches the gradient of every chosen parameter, per example.

    The result equals ``sum over parameters of flat_sketch(d loss_b / d parameter)`` up to rounding.
    Tied parameters count once. One forward pass of the model, one or more backward passes through
    it and one ``update`` go together; forward passes under ``torch.no_grad`` do not count. Linear,
    Conv1D (GPT-2), convolution and Embedding layers, norms and routed experts use the kernels, and
    so do raw calls of F.linear and F.embedding. Any other module takes a backward pass per example
    from its own outputs; a parameter that is used outside of its module, one from the model's.

    The check compares, on the first pass of every kind of call (its arguments, train or eval, which
    sizes are equal), e = |s - S(g)| / |S(g)| for one example and for the sum over examples, where S
    is ``flat_sketch`` and g autograd's gradient. It fails above 2e-5 in fp32 and 2e-2 in bf16, of
    all parameters together, and names the parameter with the largest error. Among the processes of
    FSDP2 a pass is checked in all or in none, and the check's error of one is raised in all.

    Args:
        model: called as usual inside the block. With DistributedDataParallel nothing is
            communicated; with FSDP2 all processes run equally many passes, each on own examples.
            ``sum_over_processes`` adds the states.
        sketch: width and seed.
        parameters: by name; None: all that require a gradient.
        scales: factors of the gradients' entries by parameter name (``adam_scales``).
        factors: K-FAC factors (``kfac_factors``), without ``scales``.
        blocks: blocks of each state; examples fill them in turn.
        fingerprint: the model's, for the states; None: that of its weights in memory.
        weight: as for ``sketch_gradients``, and so are the next three.
        check: "first", "always" or "never".
        uncovered: "autograd" or "error".
        parts: part -> regular expression.
        collect_side: collects the second moments of gradients, with sides up to this length kept
            whole, instead of sketching (``FactorCollector``).
        notify: gets one line whenever there are more ``slow_parameters``; None: a warning.

    Raises:
        InputError: ``check``, ``uncovered`` or ``weight`` has another value.
        MeritFastError: a parameter cannot be covered, here or in a pass; the message names it.
    """

    def __init__(  # noqa: PLR0913
        self,
        model: nn.Module,
        sketch: CountSketch,
        parameters: Mapping[str, nn.Parameter] | None = None,
        scales: Mapping[str, Tensor] | None = None,
        factors: KfacFactors | None = None,
        *,
        collect_side: int | None = None,
        blocks: int = 8,
        weight: Weight = "examples",
        fingerprint: str | None = None,
        check: Literal["first", "always", "never"] = "first",
        uncovered: Literal["autograd", "error"] = "error",
        parts: Mapping[str, str] | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        require_one_of("check", check, ("first", "always", "never"))
        require_one_of("uncovered", uncovered, ("autograd", "error"))
        require_one_of("weight", weight, get_args(Weight))
        self.ddp = model if isinstance(model, DistributedDataParallel) else None
        self.model = unwrapped(model)
        reshard(self.model)
        self.sketch = sketch
        self.blocks = blocks
        self.weight = weight
        chosen = (
            select_parameters(self.model, "all", is_trainable) if parameters is None else parameters
        )
        chosen = {canonical_name(name): parameter for name, parameter in chosen.items()}
        require_known(self.model, chosen)
        self.names = {id(parameter): name for name, parameter in chosen.items()}
        named = {canonical_name(name): scale for name, scale in (scales or {}).items()}
        self.preconditioner = Preconditioner(named, kind="adam" if named else "")
        if factors is not None:
            self.preconditioner = factors.preconditioner(chosen)
        self.state: States = {}
        self.part_state: dict[str, States] = {part: {} for part in parts or {}}
        self._fingerprint = fingerprint
        self._identity: SketchIdentity | None = None
        self._notify = notify or functools.partial(warnings.warn, stacklevel=4)
        self._told = 0  # number of slow parameters in the last line
        self._passes = SketchedPasses(
            self.model,
            chosen,
            sketch,
            self.preconditioner,
            parts=parts or {},
            check=check,
            uncovered=uncovered,
            weight=weight,
        )
        self._passes.max_side = collect_side
        self._passes.slices.require_plain(self.preconditioner.kind or collect_side, check)
        self._restore: list[Callable[[], object]] = []

    @property
    def parameter_names(self) -> list[str]:
        return list(self.names.values())

    @property
    def slow_parameters(self) -> dict[str, str]:
        """Parameters that take a backward pass per example -> reason."""
        return dict(self._passes.uncovered.slow)

    def add_slow(self, parameters: Mapping[str, str]) -> None:
        """Lets parameters, with reasons, take a backward pass per example from now on."""
        self._passes.uncovered.slow.update(parameters)

    @property
    def preconditioned(self) -> dict[str, str]:
        """Parameters -> how their gradients are multiplied: entries, or rows and columns."""
        return self.preconditioner.describe()

    @property
    def checked(self) -> SketchCheck | None:
        """The largest errors that the check has found so far; None before it."""
        result = self._passes.result
        if result is None:
            return None
        return dataclasses.replace(result, slow_parameters=self.slow_parameters)

    @property
    def is_checking(self) -> bool:
        """Whether the last pass is checked; rounding may differ from that of other passes."""
        return self._passes.is_checking

    @property
    def identity(self) -> SketchIdentity:
        """Sketch, model and parameters of the states. Reads the weights once."""
        if self._identity is None:
            fingerprint = self._fingerprint or model_weights_fingerprint(self.model)
            fingerprint = self.preconditioner.fingerprinted(fingerprint)
            self._identity = SketchIdentity(
                self.sketch, fingerprint, tuple(self.parameter_names), self.weight
            )
        return self._identity

    def __enter__(self) -> "GradientSketcher":
        self._restore.extend(freeze_weights(self.model, self.names))
        if self._passes.lockstep.is_divided:  # all processes take part
            self.identity  # noqa: B018
        self._passes.attach()
        self._restore.append(self._passes.detach)
        # As no_sync does. Buffers are not broadcast either: ranks may differ in their passes.
        if self.ddp is not None:
            for flag in ("require_backward_grad_sync", "require_forward_param_sync"):
                self._restore.append(
                    functools.partial(setattr, self.ddp, flag, getattr(self.ddp, flag))
                )
                setattr(self.ddp, flag, False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        while self._restore:
            self._restore.pop()()

    def packed(self, cu_seqlens: Tensor) -> None:
        """Announces one packed row [1, N] of examples end to end for the next forward pass.

        Every example's position_ids begin at 0. A model that gets ``cu_seq_lens_q`` needs none.

        Args:
            cu_seqlens: [B + 1] int: example b has the tokens cu_seqlens[b]..cu_seqlens[b + 1] - 1.
        """
        self._passes.packed = cu_seqlens

    def discard(self) -> None:
        """Discards the forward pass since the last update; its backward pass is then an error."""
        self._passes.discard()

    def take(self, *, row_examples: Sequence[int] | None = None) -> Tensor:
        """Returns the last backward pass's sketches [B, D] float32 without adding them."""
        return self._take(row_examples, ()).whole

    def _take(self, row_examples: Sequence[int] | None, tokens: Sequence[int]) -> Sketches:
        """Ends the pass; ``tokens`` [B] are the examples' weights, or empty."""
        run = self._passes.run
        if run is None or not run.fired:
            raise MeritFastError(
                "sketch_gradients: update() or take() before a forward and backward pass"
            )
        sketches = self._passes.take(row_examples, tokens)
        uncovered = self._passes.uncovered
        if len(uncovered.slow) > self._told:
            self._told = len(uncovered.slow)
            self._notify(uncovered.describe())
        return sketches if row_examples is None else sketches.by_example(row_examples)

    def take_moments(self) -> FactorSums:
        """Returns the second moments of the last backward pass, with ``collect_side`` only."""
        run = self._passes.run
        self.take()
        assert run is not None and run.collect is not None
        return run.collect

    def update(
        self,
        dataset_ids: Sequence[DatasetId] | Tensor,
        loss_sums: Sequence[float] | Tensor | None = None,
        num_target_tokens: Sequence[int] | Tensor | None = None,
        *,
        row_examples: Sequence[int] | None = None,
        blocks: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Adds the examples of the last backward pass to their datasets' states.

        Args:
            dataset_ids: [B] dataset of each example, by name or number.
            loss_sums: [B] each example's summed loss over its target tokens, nats, for the states'
                means.
            num_target_tokens: [B] number of those tokens; required with ``weight="tokens"``.
            row_examples: [rows of the pass] number of the example, from 0 to B - 1, to which each
                row belongs; None: row b is example b.
            blocks: [B] block of each example; None: a dataset's examples fill them in turn. Give a
                row that several datasets have the same block in all.

        Returns:
            [B, D] float32, the sketches of the examples' own losses, not multiplied by tokens.

        Raises:
            InputError: an argument breaks its rule.
            MeritFastError: the check has failed: a sketch is not autograd's, the loss is a mean
                over the batch, or with weight "tokens" not each example's mean over its tokens.
            NotFiniteError: an example's gradient holds NaN or infinity. The states are as before.
        """
        examples = UpdatedExamples.of(dataset_ids, loss_sums, num_target_tokens, blocks)
        sketches = self.take_for(examples, row_examples)
        self.add(examples, sketches)
        return sketches.whole

    def take_for(
        self, examples: UpdatedExamples, row_examples: Sequence[int] | None = None
    ) -> Sketches:
        """Ends the pass of some examples as ``update`` does, but adds nothing to the states."""
        size = len(examples.dataset_ids) if self._passes.run is None else self._passes.run.size
        examples.check(size, row_examples, self.weight, self.blocks)
        weights = examples.num_target_tokens if self.weight == "tokens" else ()
        return self._take(row_examples, weights)

    def add(self, examples: UpdatedExamples, sketches: Sketches) -> None:
        """Adds examples to their datasets' states; raises NotFiniteError before it adds any."""
        require_finite(sketches.whole, examples.dataset_ids)
        examples.add_all(sketches, self.states_of)

    def sum_over_processes(self, group: Any = None) -> tuple[States, dict[str, States]]:
        """Returns ``state`` and ``part_state`` summed over processes, with the same bits in each.

        Raises MeritFastError if there is no process group, or models or parameters differ.
        """
        self._passes.slices.require_own(group)
        parts = {part: summed_states(states, group) for part, states in self.part_state.items()}
        return summed_states(self.state, group), parts

    def states_of(self, dataset: DatasetId) -> tuple[SketchState, dict[str, SketchState]]:
        """A dataset's state and those of its parts, empty where it has none yet."""
        if dataset not in self.state:
            self.state[dataset] = SketchState.zeros(self.identity, self.blocks)
            for part, names in self._passes.names_of_parts().items():
                identity = dataclasses.replace(self.identity, parameters=names)
                self.part_state[part][dataset] = SketchState.zeros(identity, self.blocks)
        return self.state[dataset], {p: states[dataset] for p, states in self.part_state.items()}
