"""The reference: plain PyTorch with whole logits; and the checks of values that backends share."""

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.cross_entropy._arguments import Batch, HeadSketch, LogitForm, LossTerms
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.kernels.sketch import linear_grad_sketch

OP = "linear_cross_entropy"


def check_values(batch: Batch, vocabulary: int) -> None:
    """Raises ValueError for a label, dataset id or offset out of range. Waits for a GPU."""
    labels = batch.labels
    offsets = batch.offsets
    check_labels(OP, labels, vocabulary)
    if batch.dataset_ids is not None:
        wrong = _outside(batch.dataset_ids, batch.num_datasets)
        _refuse(OP, batch.dataset_ids, wrong, "dataset_ids must be", batch.num_datasets)
    if bool((offsets.diff() < 0).any() | (offsets[0] != 0) | (offsets[-1] != len(labels))):
        bounds = offsets.tolist()
        shown = str(bounds) if len(bounds) <= 16 else f"{str(bounds[:8])[:-1]}, ..., {bounds[-1]}]"
        raise ValueError(
            f"{OP}: cu_seqlens must rise from 0 to the {len(labels)} tokens, got {shown}"
        )


def check_labels(op: str, labels: Tensor, vocabulary: int) -> None:
    """Raises ValueError for a label that is neither ignored nor a word. Waits for a GPU."""
    wrong = (labels != IGNORED_LABEL) & _outside(labels, vocabulary)
    _refuse(op, labels, wrong, f"labels must be {IGNORED_LABEL} or", vocabulary)


def _outside(values: Tensor, count: int) -> Tensor:
    return (values < 0) | (values >= count)


def _refuse(op: str, values: Tensor, wrong: Tensor, rule: str, count: int) -> None:
    if bool(wrong.any()):
        raise ValueError(f"{op}: {rule} in [0, {count}), got {int(values[wrong][0])}")


def trainable_offsets(labels: Tensor, offsets: Tensor) -> Tensor:
    """[B + 1]: the first row of each example among the rows that are not ignored."""
    return F.pad((labels != IGNORED_LABEL).cumsum(0), (1, 0))[offsets]


def linear_cross_entropy(
    batch: Batch, terms: LossTerms, sketch: HeadSketch | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum, sums per example and per dataset, tokens per dataset, and tokens of all."""
    check_values(batch, len(batch.weight))
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


def linear_token_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, form: LogitForm
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, top-1 and log-sum-exp [N] of each row; 0 where it is ignored."""
    check_labels("linear_token_statistics", labels, len(weight))
    rows = (labels != IGNORED_LABEL).nonzero().squeeze(1)
    target = labels[rows]
    logits = F.linear(hidden[rows], weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * form.scale
    if form.softcap is not None:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    logits = logits / form.temperature
    lse = logits.logsumexp(-1)
    log_p = logits.log_softmax(-1)
    finite = log_p.clamp(min=torch.finfo(log_p.dtype).min)  # 0 * -infinity is no number
    entropy = -(log_p.exp() * finite).sum(-1)
    is_top1 = logits.argmax(-1) == target if len(rows) else target.bool()
    values = (log_p.gather(1, target[:, None]).squeeze(1), entropy, is_top1, lse)
    results = tuple(v.new_zeros(len(labels)).index_copy(0, rows, v) for v in values)
    return results[0], results[1], results[2], results[3]
