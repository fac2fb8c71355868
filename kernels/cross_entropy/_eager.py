"""The reference: plain PyTorch with whole logits; and the checks of values that backends share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.cross_entropy._arguments import Batch, HeadSketch, LossTerms
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import linear_grad_sketch

OP = "linear_cross_entropy"


def check_values(batch: Batch) -> None:
    """Raises ValueError for a label, dataset id or offset out of range. Waits for a GPU."""
    labels = batch.labels
    offsets = batch.offsets
    vocabulary = len(batch.weight)
    wrong = (labels != IGNORED_LABEL) & _outside(labels, vocabulary)
    _refuse(labels, wrong, f"labels must be {IGNORED_LABEL} or", vocabulary)
    if batch.dataset_ids is not None:
        wrong = _outside(batch.dataset_ids, batch.num_datasets)
        _refuse(batch.dataset_ids, wrong, "dataset_ids must be", batch.num_datasets)
    if bool((offsets.diff() < 0).any() | (offsets[0] != 0) | (offsets[-1] != len(labels))):
        bounds = offsets.tolist()
        shown = str(bounds) if len(bounds) <= 16 else f"{str(bounds[:8])[:-1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{OP}: cu_seqlens must rise from 0 to the {len(labels)} tokens, got {shown}"
        )


def _outside(values: Tensor, count: int) -> Tensor:
    return (values < 0) | (values >= count)


def _refuse(values: Tensor, wrong: Tensor, rule: str, count: int) -> None:
    if bool(wrong.any()):
        raise ValueError(f"{OP}: {rule} in [0, {count}), got {int(values[wrong][0])}")


def trainable_offsets(labels: Tensor, offsets: Tensor) -> Tensor:
    """[B + 1]: the first row of each example among the rows that are not ignored."""
    return F.pad((labels != IGNORED_LABEL).cumsum(0), (1, 0))[offsets]


def linear_cross_entropy(
    batch: Batch, terms: LossTerms, sketch: HeadSketch | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum, sums per example and per dataset, tokens per dataset, and tokens of all."""
    check_values(batch)
    kept = batch.labels != IGNORED_LABEL
    offsets = trainable_offsets(batch.labels, batch.offsets)
    labels = batch.labels[kept]
    hidden = batch.hidden[kept]
    logits = F.linear(hidden, batch.weight, batch.bias)
    if sketch is not None and logits.requires_grad:
        _sketch_in_backward(logits, hidden.detach(), offsets, sketch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if terms.softcap is not None:
        logits = terms.softcap * torch.tanh(logits / terms.softcap)
    smoothing = terms.label_smoothing
    token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    if terms.z_loss:
        token = token + terms.z_loss * logits.logsumexp(-1) ** 2
    numbers = torch.arange(len(offsets) - 1, device=token.device)
    example_ids = torch.repeat_interleave(numbers, offsets.diff())
    zeros = token.new_zeros(len(offsets) - 1, dtype=torch.float64)
    example = zeros.index_add(0, example_ids, token.double())
    dataset = example.new_zeros(batch.num_datasets)
    counts = offsets.new_zeros(batch.num_datasets)
    total = example
    if batch.dataset_ids is not None:
        dataset = dataset.index_add(0, batch.dataset_ids, example)
        counts = counts.index_add(0, batch.dataset_ids, offsets.diff())
        total = dataset if batch.dataset_weights is None else dataset * batch.dataset_weights
    return total.sum().to(token), example.to(token), dataset.to(token), counts, offsets[-1]


def _sketch_in_backward(
    logits: Tensor, hidden: Tensor, offsets: Tensor, sketch: HeadSketch
) -> None:
    """Adds the sketch of dW as soon as the gradient of the logits is known."""

    def add(gradient: Tensor) -> None:
        linear_grad_sketch(
            gradient, hidden, sketch.name, sketch.sketch, cu_seqlens=offsets, out=sketch.out
        )

    logits.register_hook(add)  # type: ignore[no-untyped-call]
