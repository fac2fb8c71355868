"""The custom ops of linear + cross-entropy: the losses' sums, and their gradients.

Rows with ignored labels are dropped inside, so that no shape outside depends on data. The forward
op also returns what the backward op needs: maximum and sum of exponentials of each row, and the
logits it kept.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels._functorch import differentiable, entry_by_entry, tags
from merit_fast.kernels.cross_entropy import _native, _passes, _tiled
from merit_fast.kernels.cross_entropy._arguments import Batch, HeadSketch, LogitForm, LossTerms
from merit_fast.kernels.cross_entropy._coefficients import loss_coefficients, token_losses
from merit_fast.kernels.cross_entropy._eager import OP, check_values, trainable_offsets
from merit_fast.kernels.cross_entropy._vocabulary import (
    add_over_processes,
    check_shares,
    combine_states,
)
from merit_fast.kernels.sketch import CountSketch, linear_grad_sketch

# The rows with a label are counted on the host.
TAGS = tags("needs_exact_strides", "cudagraph_unsafe")


def _epilogue(backend: str) -> ModuleType:
    """The backend's module with ``update`` and ``gradient``."""
    if backend == "triton":
        from merit_fast.kernels.cross_entropy import _triton

        return _triton
    return _native


def head_of(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    form: LogitForm,
    vocabulary: list[int],
    backend: str,
    sketched: bool = False,
) -> _tiled.TiledHead:
    """The head of (hidden, weight, bias, labels).

    Both ops get the chosen backend, never None: it decides the layout of the logits kept.
    """
    in_one_call = backend == "cpu" and not sketched and _native.has_head_passes(tensors[1])
    return _tiled.TiledHead(*tensors, form, _epilogue(backend), vocabulary[0], in_one_call)


@torch.library.custom_op("merit_fast::linear_cross_entropy", mutates_args=(), tags=TAGS)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor,
    dataset_ids: Tensor | None,
    num_datasets: int,
    dataset_weights: Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    sketch: list[int],
    sketch_name: str,
    sketch_out: Tensor | None,
    vocabulary: list[int],
    group: str,
    for_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The sums of a ``Batch``, and what the backward op needs.

    Returns:
        total [], example [B], dataset [D], tokens per dataset [D] and of all [], then softmax [2,
        N] (maximum and sum of exponentials of each trainable row) and the logits kept.
    """
    batch = Batch(hidden, weight, bias, labels, offsets, dataset_ids, num_datasets, dataset_weights)
    # First, so that no process waits for one that has raised.
    check_shares(OP, vocabulary, weight, labels, group)
    check_values(batch, vocabulary[1])
    terms = LossTerms(softcap, label_smoothing, z_loss)
    tensors = (hidden, weight, bias, labels)
    head = head_of(tensors, LogitForm(softcap), vocabulary, backend, bool(sketch))
    numel = _tiled.kept_numel(hidden, weight) if for_backward else 0
    kept = hidden.new_empty(numel, dtype=head.dtype)
    state = _passes.forward(head, kept, statistics=False)
    combine_states(state, group)
    softmax = hidden.new_zeros(2, len(labels), dtype=torch.float64)
    softmax[:, : len(head)] = state[:2]
    first_rows = trainable_offsets(labels, offsets)
    token_loss = token_losses(state, terms, vocabulary[1])
    *sums, counts = _loss_sums(token_loss, first_rows, batch)
    total, example, dataset = (values.float() for values in sums)
    return total, example, dataset, counts, first_rows[-1].clone(), softmax, kept


def _loss_sums(
    token_loss: Tensor, offsets: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of float64 losses, sums per example and per dataset, and tokens per dataset.

    Each sum runs in the order of the tokens, without atomics: no bit depends on threads.
    """
    example = _segments(token_loss, offsets)
    dataset = example.new_zeros(batch.num_datasets)
    counts = offsets.new_zeros(batch.num_datasets)
    total = example
    if batch.dataset_ids is not None:
        order = batch.dataset_ids.argsort(stable=True)
        numbers = torch.arange(batch.num_datasets + 1, device=example.device)
        starts = torch.searchsorted(batch.dataset_ids[order], numbers)
        dataset = _segments(example[order], starts)
        counts = counts.index_add(0, batch.dataset_ids, offsets.diff())
        total = dataset if batch.dataset_weights is None else dataset * batch.dataset_weights
    ends = torch.arange(2, device=total.device) * len(total)
    return _segments(total, ends)[0], example, dataset, counts


def _segments(values: Tensor, offsets: Tensor) -> Tensor:
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)
    return sums


@linear_cross_entropy.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, offsets, dataset_ids, num_datasets, dataset_weights,
    softcap, label_smoothing, z_loss, sketch, sketch_name, sketch_out, vocabulary, group,
    for_backward, backend,
):  # fmt: skip
    def new(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        empty: Tensor = hidden.new_empty(shape, dtype=dtype)
        return empty

    numel = _tiled.kept_numel(hidden, weight) if for_backward else 0
    return (
        new(),
        new(offsets.shape[0] - 1),
        new(num_datasets),
        new(num_datasets, dtype=torch.int64),
        new(dtype=torch.int64),
        new(2, hidden.shape[0], dtype=torch.float64),
        new(numel, dtype=_tiled.work_dtype(weight)),
    )


@torch.library.custom_op(
    "merit_fast::linear_cross_entropy_backward", mutates_args={"sketch_out"}, tags=TAGS
)
def linear_cross_entropy_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    offsets: Tensor,
    dataset_ids: Tensor | None,
    dataset_weights: Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    sketch: list[int],
    sketch_name: str,
    sketch_out: Tensor | None,
    vocabulary: list[int],
    group: str,
    backend: str,
    softmax: Tensor,
    kept: Tensor,
    d_total: Tensor | None,
    d_example: Tensor | None,
    d_dataset: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; unwanted ones are empty."""
    batch = Batch(hidden, weight, bias, labels, offsets, dataset_ids, 0, dataset_weights)
    terms = LossTerms(softcap, label_smoothing, z_loss)
    tensors = (hidden, weight, bias, labels)
    head = head_of(tensors, LogitForm(softcap), vocabulary, backend, bool(sketch))
    weights = _row_weights(batch, d_total, d_example, d_dataset)[head.rows]
    coefficients = loss_coefficients(softmax[:, : len(head)], weights, terms, vocabulary[1])
    take = None
    if sketch_out is not None:
        head_sketch = HeadSketch(CountSketch(*sketch), sketch_name, sketch_out)
        take = _sketcher(head, trainable_offsets(labels, offsets), head_sketch, backend)
    return gradients_of_head(head, hidden, kept, coefficients, wanted, group, take)


def gradients_of_head(
    head: _tiled.TiledHead,
    hidden: Tensor,
    kept: Tensor,
    coefficients: Tensor,
    wanted: list[bool],
    group: str,
    take: _passes.TakeGradient | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden [N, H], weight and bias, in their dtypes; unwanted ones are empty."""
    weight = head.weight
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = None
    if head.bias is not None and wanted[2]:
        d_bias = torch.zeros_like(head.bias)
    arguments = (head, kept, coefficients, d_weight, d_bias, wanted[0])
    if head.in_one_call and len(head):
        sums = _passes.backward_in_one_call(*arguments)
    else:
        sums = _passes.backward(*arguments, take)
    d_hidden = weight.new_empty(0)
    if sums is not None:
        add_over_processes(sums, group)
        d_hidden = torch.zeros_like(hidden)
        d_hidden[head.rows] = sums.to(hidden.dtype)
    return (
        d_hidden,
        weight.new_empty(0) if d_weight is None else d_weight,
        weight.new_empty(0) if d_bias is None else d_bias.to(weight.dtype),
    )


def _sketcher(
    head: _tiled.TiledHead, offsets: Tensor, sketch: HeadSketch, backend: str
) -> _passes.TakeGradient:
    """Adds the sketch of dW, per example, from the gradient of the logits of a tile."""

    def take(d: Tensor, rows: slice, first: int) -> None:
        inside = (offsets - rows.start).clamp(0, rows.stop - rows.start)
        linear_grad_sketch(
            d, head.hidden[rows], sketch.name, sketch.sketch,
            cu_seqlens=inside, first_row=first, out=sketch.out, backend=backend,
        )  # fmt: skip

    return take


def _row_weights(
    batch: Batch, d_total: Tensor | None, d_example: Tensor | None, d_dataset: Tensor | None
) -> Tensor:
    """[N] float64: derivative of the result with respect to each token's loss."""
    ids = batch.dataset_ids
    factors = batch.dataset_weights
    offsets = batch.offsets
    weights = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=offsets.device)
    if d_total is not None:
        if ids is not None and factors is not None:
            weights += d_total * factors.double()[ids]
        else:
            weights += d_total
    if d_example is not None:
        weights += d_example
    if d_dataset is not None and ids is not None:
        weights += d_dataset[ids]
    return torch.repeat_interleave(weights, offsets.diff(), output_size=len(batch.labels))


@linear_cross_entropy_backward.register_fake
def fake_gradients(hidden, weight, bias, *arguments):  # type: ignore[no-untyped-def]
    """Unfilled results of ``gradients_of_head``; the last argument of its ops is ``wanted``."""
    wanted = arguments[-1]
    return tuple(
        torch.empty_like(like) if want and like is not None else hidden.new_empty(0)
        for want, like in zip(wanted, (hidden, weight, bias), strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = inputs[:6]
    _, dataset_weights, *options, sketch_out, vocabulary, group, _, backend = inputs[6:]
    ctx.save_for_backward(*tensors, dataset_weights, *output[-2:])
    ctx.set_materialize_grads(False)  # no zeros for results that are no loss
    ctx.options = options
    # Not saved as a tensor: other layers may add to it before this backward pass.
    ctx.sketch_out = sketch_out
    ctx.vocabulary = vocabulary, group, backend


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, softmax, kept = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[k] for k in range(3)]
    results = linear_cross_entropy_backward(
        *inputs,
        *ctx.options,
        ctx.sketch_out,
        *ctx.vocabulary,
        softmax,
        kept,
        *gradients[:3],
        wanted,
    )
    of_inputs = [result if want else None for want, result in zip(wanted, results, strict=True)]
    return *of_inputs, *[None] * (len(ctx.needs_input_grad) - 3)


entry_by_entry(linear_cross_entropy)
entry_by_entry(linear_cross_entropy_backward)
run_linear_cross_entropy = differentiable(linear_cross_entropy, _setup_context, _backward)
