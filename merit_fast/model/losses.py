"""Losses of a model on the target tokens of a batch."""

from typing import TYPE_CHECKING, NamedTuple

from merit_fast.model.inputs import model_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from merit_fast.data import Batch


class TargetLosses(NamedTuple):
    """Losses of a batch's M target tokens, in batch order."""

    loss: "Tensor"  # [M] float32, nats
    correct: "Tensor"  # [M] bool: the target is the greedy choice
    example: "Tensor"  # [M] int64: row of the batch, or index in a packed row


def target_losses(
    model: "nn.Module", batch: "Batch", plain_attention: bool = False
) -> TargetLosses:
    """Cross-entropy of every target token (label != -100, after the shift), in float32.

        logits = model(...).logits[:, :-1].float()
        loss = F.cross_entropy(logits[mask], labels[:, 1:][mask])

    Only the last ``batch.logits_to_keep`` positions go through the head, if the model's forward has
    an argument for it. ``plain_attention`` chooses attention whose gradient has a gradient.
    """
    inputs, targets = model_inputs(model, batch, plain_attention)
    return score_batch(model(**inputs).logits, targets, batch)


def score_batch(logits: "Tensor", targets: "Tensor", batch: "Batch") -> TargetLosses:
    """Losses of a batch's targets by its logits and by the targets of ``model_inputs``."""
    import torch

    from merit_fast.data import PackedBatch

    loss, correct, row, column = score_targets(logits, targets)
    if isinstance(batch, PackedBatch):
        first = batch.input_ids.shape[1] - targets.shape[1] - 1
        row = torch.bucketize(column + first, batch.cu_seqlens[1:].to(row.device), right=True)
    return TargetLosses(loss, correct, row)


def score_targets(logits: "Tensor", targets: "Tensor") -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Scores the M targets (not -100) among ``targets`` [B, n] of the last n + 1 positions.

    Returns:
        Losses [M] in float32, whether each target is the greedy choice [M], and the rows and the
        columns [M] of ``targets`` at which they stand.
    """
    import torch
    from torch.nn import functional as F

    mask = targets != -100
    chosen = logits[:, -targets.shape[1] - 1 : -1][mask].float()  # [M, V]
    row, column = torch.nonzero(mask, as_tuple=True)
    targets = targets[mask]
    loss = F.cross_entropy(chosen, targets, reduction="none")
    return loss, chosen.detach().argmax(-1) == targets, row, column
