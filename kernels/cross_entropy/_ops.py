"""The custom ops of linear + cross-entropy: the losses' sums, and their gradients.

Rows with ignored labels are found inside, so that no shape outside depends on data. The forward op also returns what
the backward op needs: maximum and sum of exponentials of each row, and logits that it kept.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from merit_fast.kernels import dispatch
from merit_fast.kernels.cross_entropy import _tiled
from merit_fast.kernels.cross_entropy._eager import OP, check_values, trainable_offsets
from merit_fast.kernels.sketch import CountSketch


def _epilogue(device_type: str, backend: str | None) -> tuple[str, ModuleType]:
    chosen = dispatch.choose(OP, device_type, backend)
    if chosen == "triton":
        from merit_fast.kernels.cross_entropy import _triton

        return chosen, _triton
    from merit_fast.kernels.cross_entropy import _native

    return chosen, _native


@torch.library.custom_op("merit_fast::linear_cross_entropy", mutates_args=())
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
    for_backward: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """total [], example [B], dataset [D], tokens per dataset [D] and in all [], softmax [2, N], logits kept."""
    check_values(labels, len(weight), offsets, dataset_ids, num_datasets)
    terms = _tiled.LossTerms(softcap, label_smoothing, z_loss)
    head = _tiled.TiledHead(
        hidden, weight, bias, labels, terms, _epilogue(hidden.device.type, backend)[1]
    )
    softmax = hidden.new_zeros(2, len(labels), dtype=torch.float64)
    kept = hidden.new_empty(
        _tiled.kept_numel(hidden, weight) if for_backward else 0, dtype=head.dtype
    )
    token_loss = _tiled.forward(head, kept, softmax)
    offsets = trainable_offsets(labels, offsets)
    *sums, counts = _loss_sums(token_loss, offsets, dataset_ids, num_datasets, dataset_weights)
    total, example, dataset = (values.float() for values in sums)
    return total, example, dataset, counts, offsets[-1].clone(), softmax, kept


def _loss_sums(
    token_loss: Tensor,
    offsets: Tensor,
    dataset_ids: Tensor | None,
    num_datasets: int,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of float64 losses: their weighted sum, the sums per example and per dataset; and the tokens per dataset.

    Each sum runs in the order of the tokens, without atomics: no bit depends on threads.
    """
    example = _segments(token_loss, offsets)
    dataset, counts, total = (
        example.new_zeros(num_datasets),
        offsets.new_zeros(num_datasets),
        example,
    )
    if dataset_ids is not None:
        order = dataset_ids.argsort(stable=True)
        starts = torch.searchsorted(
            dataset_ids[order], torch.arange(num_datasets + 1, device=example.device)
        )
        dataset, counts = (
            _segments(example[order], starts),
            counts.index_add(0, dataset_ids, offsets.diff()),
        )
        total = dataset if weights is None else dataset * weights
    ends = torch.arange(2, device=total.device) * len(total)
    return _segments(total, ends)[0], example, dataset, counts


def _segments(values: Tensor, offsets: Tensor) -> Tensor:
    sums: Tensor = torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)
    return sums


@linear_cross_entropy.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, offsets, dataset_ids, num_datasets, dataset_weights, softcap, label_smoothing, z_loss,
    sketch, sketch_name, sketch_out, for_backward, backend,
):  # fmt: skip
    def new(*shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        made: Tensor = hidden.new_empty(shape, dtype=dtype)
        return made

    examples, counted = offsets.shape[0] - 1, torch.int64
    sums = (
        new(),
        new(examples),
        new(num_datasets),
        new(num_datasets, dtype=counted),
        new(dtype=counted),
    )
    kept = new(
        _tiled.kept_numel(hidden, weight) if for_backward else 0, dtype=_tiled.work_dtype(weight)
    )
    return *sums, new(2, hidden.shape[0], dtype=torch.float64), kept


@torch.library.custom_op("merit_fast::linear_cross_entropy_backward", mutates_args={"sketch_out"})
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
    backend: str | None,
    softmax: Tensor,
    kept: Tensor,
    d_total: Tensor | None,
    d_example: Tensor | None,
    d_dataset: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; one that is not wanted is empty."""
    chosen, epilogue = _epilogue(hidden.device.type, backend)
    head = _tiled.TiledHead(
        hidden, weight, bias, labels, _tiled.LossTerms(softcap, label_smoothing, z_loss), epilogue
    )
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.empty_like(weight) if wanted[1] else None
    d_bias = (
        weight.new_zeros(len(weight), dtype=torch.float32)
        if bias is not None and wanted[2]
        else None
    )
    if not len(head) and d_weight is not None:
        d_weight.zero_()
    of_head = None
    if sketch_out is not None:
        where = trainable_offsets(labels, offsets)
        of_head = _tiled.HeadSketch(CountSketch(*sketch), sketch_name, sketch_out, where, chosen)
    weights = _row_weights(
        len(labels), offsets, dataset_ids, dataset_weights, d_total, d_example, d_dataset
    )
    _tiled.backward(head, kept, softmax, weights, d_hidden, d_weight, d_bias, of_head)
    rounded = None if bias is None or d_bias is None else d_bias.to(bias.dtype)
    d_hidden, d_weight, rounded = (
        hidden.new_empty(0) if d is None else d for d in (d_hidden, d_weight, rounded)
    )
    return d_hidden, d_weight, rounded


def _row_weights(
    tokens: int,
    offsets: Tensor,
    dataset_ids: Tensor | None,
    dataset_weights: Tensor | None,
    d_total: Tensor | None,
    d_example: Tensor | None,
    d_dataset: Tensor | None,
) -> Tensor:
    """[N] float64: what the loss of each token counts in all that is differentiated."""
    weights = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=offsets.device)
    if d_total is not None:
        weighted = dataset_ids is not None and dataset_weights is not None
        weights += d_total * dataset_weights.double()[dataset_ids] if weighted else d_total  # type: ignore[union-attr]
    if d_example is not None:
        weights += d_example
    if d_dataset is not None and dataset_ids is not None:
        weights += d_dataset[dataset_ids]
    return torch.repeat_interleave(weights, offsets.diff(), output_size=tokens)


@linear_cross_entropy_backward.register_fake
def _(hidden, weight, bias, *arguments):  # type: ignore[no-untyped-def]
    wanted = arguments[-1]
    return tuple(
        torch.empty_like(like) if want and like is not None else hidden.new_empty(0)
        for want, like in zip(wanted, (hidden, weight, bias), strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    (
        hidden,
        weight,
        bias,
        labels,
        offsets,
        dataset_ids,
        _,
        dataset_weights,
        *options,
        sketch_out,
        _,
        backend,
    ) = inputs
    ctx.save_for_backward(
        hidden, weight, bias, labels, offsets, dataset_ids, dataset_weights, *output[-2:]
    )
    ctx.set_materialize_grads(False)  # no zeros for what is no loss
    # Not saved as a tensor: other layers may add to it before the backward pass comes here.
    ctx.options, ctx.sketch_out, ctx.backend = options, sketch_out, backend


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, softmax, kept = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[k] for k in range(3)]
    results = linear_cross_entropy_backward(
        *inputs, *ctx.options, ctx.sketch_out, ctx.backend, softmax, kept, *gradients[:3], wanted
    )
    found = [result if want else None for want, result in zip(wanted, results, strict=True)]
    return *found, *[None] * (len(ctx.needs_input_grad) - 3)


linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
