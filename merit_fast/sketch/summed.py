"""Sketches of summed gradients, read on their way into ``parameter.grad`` while a model trains.

A hook on each parameter sees the gradient that a backward pass adds to ``.grad``, before
accumulation, clipping and any reduction over ranks, and sketches it: one read of the gradient. It
changes and keeps nothing, so training gives the same bits as without it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.sketch import CountSketch, flat_sketch, matrix_shape
from merit_fast.manifests.sketch_state import SketchIdentity, SketchState, Weight
from merit_fast.sketch.examples import DatasetId, one_dataset
from merit_fast.sketch.names import canonical_name
from merit_fast.sketch.precondition import requested_scales, scales_fingerprint
from merit_fast.sketch.selection import (
    model_weights_fingerprint,
    require_one_of,
    select_parameters,
)


def sketch_sums(
    model: nn.Module,
    proj_dim: int = 65536,
    seed: int = 0,
    parameters: str = "all",
    normalize: Literal["adam"] | None = None,
    optimizer: Any = None,
    blocks: int = 8,
    *,
    weight: Weight = "examples",
) -> "SummedSketcher":
    """Sketches the gradient of every backward pass of a training loop inside a with-block.

        with sketch_sums(model) as sketcher:
            loss.backward()  # the mean over 8 examples of one dataset
            sketcher.update("alpaca", count=8, loss_divisor=8)
            optimizer.step()
        sketcher.state  # dataset -> SketchState

    Args:
        model: any torch module, or one in DistributedDataParallel.
        proj_dim: width of the CountSketch, a multiple of 4096.
        seed: seed of its hash.
        parameters: as for ``sketch_gradients``: "all", "blocks" or a regular expression.
        normalize: "adam" multiplies every gradient as Adam would, by ``optimizer``'s second
            moments.
        optimizer: an Adam or AdamW that has stepped; with ``normalize`` only.
        blocks: blocks of each dataset's state, for standard errors.
        weight: what the summed losses are of: "examples", one loss each; "tokens", the losses of
            their target tokens, so that an example counts as often as it has target tokens, as in a
            training step with a mean over tokens.

    Raises:
        InputError: an argument breaks its rule.
        MeritFastError: a parameter is sharded, or has no second moments; the message names it.
    """
    core = model.module if isinstance(model, DistributedDataParallel) else model
    chosen = select_parameters(core, parameters)
    scales = requested_scales(core, normalize, optimizer, chosen)
    return SummedSketcher(
        core, CountSketch(proj_dim, seed), chosen, scales or None, blocks=blocks, weight=weight
    )


class SummedSketcher:
    """Sketches the gradient of every backward pass, one dataset per pass, while a model trains.

        with SummedSketcher(model, CountSketch(65536), dict(model.named_parameters())) as sketcher:
            loss.backward()                       # the mean over 8 examples of one dataset
            sketcher.update("alpaca", count=8, loss_divisor=8)
            optimizer.step()

    Equals ``loss_divisor * sum over parameters of flat_sketch(g)``, g the pass's addition to
    ``parameter.grad``, up to rounding. Tied parameters count once, by one name; a parameter without
    gradient in a pass adds nothing. Under DDP every rank sketches its own examples, before the
    gradients are averaged: add the ranks' states.

    ``state`` holds a ``SketchState`` per dataset whose units are passes: each goes to the block
    with the least weight (examples or target tokens), so equal passes fill the blocks in turn.
    Estimates from block sums and weights stay unbiased, for passes of unequal size too: E[block sum
    | weight] = weight * mean. Sums of gradients do not tell the sum of |w s|^2 over examples, nor
    the sum under the other weighting: ``block_square_norms``, ``block_square_weights`` and
    ``other_sum`` are NaN, and so is every figure that needs them. While the model's weights change,
    the mean is that along the run. The identity has ``sum`` (and the scales) before the model's
    fingerprint, so such a state never merges with one of per-example gradients at fixed weights.

    Args:
        model: the model of ``parameters``.
        sketch: width and seed.
        parameters: trainable parameters to sketch, by name.
        scales: factors of the gradients' entries by name, float32 [R, C] (``adam_scales``); for all
            parameters, or None.
        blocks: blocks of each dataset's state.
        weight: "examples" or "tokens", as for ``sketch_sums``.
        fingerprint: the model's at the start of training; None: that of its weights now.

    Raises:
        MeritFastError: a parameter that is frozen, sharded (DTensor), twice in ``parameters`` or
            without a scale.
    """

    def __init__(
        self,
        model: nn.Module,
        sketch: CountSketch,
        parameters: Mapping[str, nn.Parameter],
        scales: Mapping[str, Tensor] | None = None,
        *,
        blocks: int = 8,
        weight: Weight = "examples",
        fingerprint: str | None = None,
    ) -> None:
        require_one_of("weight", weight, get_args(Weight))
        self.sketch = sketch
        self.blocks = blocks
        self.scales = scales
        self.parameters = {canonical_name(name): p for name, p in parameters.items()}
        self.state: dict[DatasetId, SketchState] = {}
        if not self.parameters:
            raise MeritFastError(
                f"sketch: {type(model).__name__} has no trainable parameter among the chosen ones"
            )
        self._check()
        adam = f" adam {scales_fingerprint(scales)}" if scales else ""
        fingerprint = model_weights_fingerprint(model) if fingerprint is None else fingerprint
        self.identity = SketchIdentity(
            sketch, f"sum{adam}: {fingerprint}", tuple(self.parameters), weight
        )
        self._sums: dict[torch.device, Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "SummedSketcher":
        for name, parameter in self.parameters.items():
            handle = parameter.register_hook(self._hook(name))  # type: ignore[no-untyped-call]
            self._handles.append(handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._sums.clear()

    def update(
        self,
        dataset_id: DatasetId | Sequence[DatasetId] | Tensor,
        count: int | None = None,
        loss_sum: float = 0.0,
        num_target_tokens: int = 0,
        *,
        loss_divisor: float = 1.0,
    ) -> Tensor:
        """Adds the backward passes since the last update, as one unit, to a dataset's state.

        Args:
            dataset_id: dataset of the examples; or one id per example, all equal.
            count: number of examples; None: the number of ids.
            loss_sum: their summed loss, nats.
            num_target_tokens: number of their target tokens; required with ``weight="tokens"``.
            loss_divisor: divisor of the sum of the losses before ``backward``: ``count`` for a mean
                over examples, the optimizer step's target tokens for a mean over these.

        Returns:
            [1, D] float32, the sketch of the gradient of the summed losses.

        Raises:
            InputError: the weights are tokens, and no target token was given.
            MeritFastError: no backward pass since the last update, examples of several datasets, or
                a gradient that is not finite. The state is as before.
        """
        dataset, count = one_dataset(dataset_id, count)
        if self.identity.weight == "tokens" and num_target_tokens < 1:
            raise InputError(
                f"num_target_tokens: must be at least 1 with weight 'tokens', "
                f"got {num_target_tokens}"
            )
        if not self._sums:
            raise MeritFastError(
                f"sketch: update({dataset!r}): no backward pass through the chosen parameters "
                "since the last update"
            )
        total = sum(sums.cpu().double() for sums in self._sums.values())
        self._sums.clear()
        assert isinstance(total, Tensor)
        total *= loss_divisor
        if not torch.isfinite(total).all():
            raise MeritFastError(f"sketch: the gradient of dataset {dataset!r} is not finite")
        self._add(dataset, total, count, loss_sum, num_target_tokens)
        return total.float()

    def discard(self) -> None:
        """Discards the backward passes since the last update."""
        self._sums.clear()

    def restore(self, states: Mapping[DatasetId, SketchState]) -> None:
        """Resumes from states kept earlier.

        Raises:
            MeritFastError: a state of another sketch, model, mode or parameters; the message names
                the difference.
        """
        for state in states.values():
            SketchState.zeros(self.identity, self.blocks).merge(state)
        self.state = dict(states)

    def _add(
        self, dataset: DatasetId, total: Tensor, count: int, loss_sum: float, tokens: int
    ) -> None:
        if dataset not in self.state:
            state = self.state[dataset] = SketchState.zeros(self.identity, self.blocks)
            state.block_square_norms.fill_(torch.nan)
            state.block_square_weights.fill_(torch.nan)
            state.other_sum.fill_(torch.nan)
        state = self.state[dataset]
        block = int(state.block_weights.argmin())
        state.block_sums[block] += total[0]
        state.block_weights[block] += count if state.identity.weight == "examples" else tokens
        state.block_counts[block] += count
        state.loss_sum += loss_sum
        state.num_target_tokens += tokens

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        shape = matrix_shape(self.parameters[name].shape)
        scale = self.scales[name] if self.scales else None

        @torch.no_grad()
        def hook(gradient: Tensor) -> None:
            gradient = gradient.detach()
            rows = None
            if gradient.is_sparse and gradient.dim() < 2:
                gradient = gradient.to_dense()
            if gradient.is_sparse:  # an embedding's rows, repeats not yet summed
                if gradient.sparse_dim() != 1:
                    raise MeritFastError(
                        f"sketch: the gradient of parameter {name} is sparse within its rows"
                    )
                rows = gradient._indices()
                gradient = gradient._values()
            matrix = gradient.reshape(-1, shape[1]) if rows is not None else gradient.reshape(shape)
            flat_sketch(
                matrix.unsqueeze(0),
                name,
                self.sketch,
                row_ids=rows,
                scale=scale,
                out=self._out(matrix.device),
            )

        return hook

    def _out(self, device: torch.device) -> Tensor:
        if device not in self._sums:
            self._sums[device] = torch.zeros(1, self.sketch.proj_dim, device=device)
        return self._sums[device]

    def _check(self) -> None:
        names: dict[int, str] = {}
        for name, parameter in self.parameters.items():
            if not parameter.requires_grad:
                raise MeritFastError(
                    f"sketch: parameter {name} is frozen: sketch_sums reads gradients of training"
                )
            # A DTensor, or emptied by ZeRO-3.
            if hasattr(parameter, "device_mesh") or not parameter.numel():
                raise MeritFastError(
                    f"sketch: parameter {name} is sharded: no rank sees its whole gradient"
                )
            if id(parameter) in names:
                raise MeritFastError(
                    f"sketch: parameters {names[id(parameter)]} and {name} are one: name it once"
                )
            if self.scales is not None and name not in self.scales:
                raise MeritFastError(f"sketch: parameter {name} has no scale")
            names[id(parameter)] = name
