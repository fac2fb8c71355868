"""Linear + cross-entropy without the logits in memory, with sums per example and per dataset."""

from typing import NamedTuple

import torch
from torch import Tensor

from merit_fast.kernels.cross_entropy import _eager

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]


class LinearCrossEntropy(NamedTuple):
    """What ``linear_cross_entropy`` returns; all but the counts carry a gradient."""

    loss: Tensor  # scalar float32
    example_loss: Tensor  # [B] float32: sums over each example's target tokens, without dataset weights
    dataset_loss: Tensor  # [num_datasets] float32: the same per dataset; empty without dataset_ids
    dataset_tokens: Tensor  # [num_datasets] int64: target tokens; empty without dataset_ids


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    dataset_ids: Tensor | None = None,
    num_datasets: int | None = None,
    dataset_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
    divisor: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> LinearCrossEntropy:
    """The cross-entropy of a language model's head, whose logits are never held as a whole.

        logits = hidden.float() @ weight.float().T + bias                    # [N, V]
        logits = softcap * tanh(logits / softcap)                            # with softcap
        token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
        token = token + z_loss * logits.logsumexp(-1) ** 2                   # PaLM (Chowdhery et al. 2022)
        example_loss[b] = token[of b].sum();  dataset_loss[d] = token[of d].sum()
        loss = (dataset_weights[dataset of each token] * token).sum() / divisor

    Args:
        hidden: [N, H] or [B, T, H], float32 or bfloat16.
        weight: [V, H], the dtype of hidden.
        labels: [N] or [B, T] int64, **already shifted**: the label of the position it is predicted at; -100 is ignored,
            and such rows enter no matrix product.
        bias: [V].
        dataset_ids: [B] int64, 0 <= id < num_datasets, of the examples.
        num_datasets: N; needed with dataset_ids.
        dataset_weights: [num_datasets] float32, constants; None: all 1.
        cu_seqlens: [B + 1]: examples lie end to end in the N tokens. None: an example is a row of [B, T], or each
            token of [N].
        reduction: "mean" divides ``loss`` by the number of target tokens, "sum" by 1.
        divisor: instead of reduction, e.g. the target tokens of all micro-batches of a step.
    """
    flat, targets, example_ids, num_examples = _eager.flatten(hidden, labels, cu_seqlens)
    return LinearCrossEntropy(
        *_eager.linear_cross_entropy(
            flat, weight, targets, bias, example_ids, num_examples, dataset_ids, num_datasets or 0, dataset_weights,
            reduction, divisor, label_smoothing, softcap, z_loss,
        )
    )  # fmt: skip
