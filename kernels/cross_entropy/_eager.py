"""The reference: plain PyTorch, logits and all. Its checks of values and its offsets are every backend's."""

import torch
from torch import Tensor
from torch.nn import functional as F

from merit_fast.kernels.sketch import CountSketch, linear_grad_sketch

OP = "linear_cross_entropy"
IGNORED = -100


def check_values(
    labels: Tensor, vocabulary: int, offsets: Tensor, dataset_ids: Tensor | None, num_datasets: int
) -> None:
    """A value out of its range is an error that names it. On a GPU this waits, as finding the trainable rows does."""
    _refuse(
        labels,
        (labels != IGNORED) & _outside(labels, vocabulary),
        f"labels must be {IGNORED} or",
        vocabulary,
    )
    if dataset_ids is not None:
        _refuse(
            dataset_ids, _outside(dataset_ids, num_datasets), "dataset_ids must be", num_datasets
        )
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
    """[B + 1]: where each example begins among the rows that are not ignored."""
    return F.pad((labels != IGNORED).cumsum(0), (1, 0))[offsets]


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
    sketch: CountSketch | None,
    sketch_name: str,
    sketch_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, the sums per example and per dataset, the tokens per dataset and in all."""
    check_values(labels, len(weight), offsets, dataset_ids, num_datasets)
    kept = labels != IGNORED
    offsets, labels, hidden = trainable_offsets(labels, offsets), labels[kept], hidden[kept]
    logits = F.linear(hidden, weight, bias)
    if sketch is not None and logits.requires_grad:
        _sketch_when_known(logits, hidden.detach(), offsets, sketch, sketch_name, sketch_out)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        token = token + z_loss * logits.logsumexp(-1) ** 2
    example_ids = torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=token.device), offsets.diff()
    )
    example = token.new_zeros(len(offsets) - 1, dtype=torch.float64).index_add(
        0, example_ids, token.double()
    )
    dataset, counts = example.new_zeros(num_datasets), offsets.new_zeros(num_datasets)
    total = example
    if dataset_ids is not None:
        dataset, counts = (
            dataset.index_add(0, dataset_ids, example),
            counts.index_add(0, dataset_ids, offsets.diff()),
        )
        total = dataset if dataset_weights is None else dataset * dataset_weights
    return total.sum().to(token), example.to(token), dataset.to(token), counts, offsets[-1]


def _sketch_when_known(
    logits: Tensor,
    hidden: Tensor,
    offsets: Tensor,
    sketch: CountSketch,
    name: str,
    out: Tensor | None,
) -> None:
    def add(gradient: Tensor) -> None:
        linear_grad_sketch(gradient, hidden, name, sketch, cu_seqlens=offsets, out=out)

    logits.register_hook(add)  # type: ignore[no-untyped-call]
