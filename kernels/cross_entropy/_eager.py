"""The reference: plain PyTorch, logits and all."""

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def flatten(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """hidden [N, H], labels [N], the example of each token [N], and how many examples there are."""
    targets = labels.reshape(-1)
    if cu_seqlens is not None:
        num_examples = len(cu_seqlens) - 1
        positions = torch.arange(len(targets), device=targets.device)
        ids = torch.bucketize(positions, cu_seqlens[1:].to(targets.device), right=True)
    else:
        num_examples, per_example = labels.shape[0], targets.numel() // max(1, labels.shape[0])
        ids = torch.arange(num_examples, device=targets.device).repeat_interleave(per_example)
    return hidden.reshape(-1, hidden.shape[-1]), targets, ids, num_examples


def linear_cross_entropy(
    hidden, weight, labels, bias, example_ids, num_examples, dataset_ids, num_datasets, dataset_weights, reduction,
    divisor, label_smoothing, softcap, z_loss,
):  # fmt: skip
    kept = labels != IGNORED
    hidden, labels, example_ids = hidden[kept], labels[kept], example_ids[kept]
    logits = F.linear(hidden, weight, bias).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        token = token + z_loss * logits.logsumexp(-1) ** 2
    example_loss = token.new_zeros(num_examples).index_add(0, example_ids, token)
    dataset_loss = token.new_zeros(num_datasets)
    dataset_tokens = torch.zeros(num_datasets, dtype=torch.int64, device=token.device)
    weighted = token
    if dataset_ids is not None:
        of_token = dataset_ids.to(token.device)[example_ids]
        dataset_loss = dataset_loss.index_add(0, of_token, token)
        dataset_tokens = dataset_tokens.index_add(0, of_token, torch.ones_like(of_token))
        if dataset_weights is not None:
            weighted = token * dataset_weights.to(token)[of_token]
    if divisor is None:
        divisor = max(1, len(labels)) if reduction == "mean" else 1
    return weighted.sum() / divisor, example_loss, dataset_loss, dataset_tokens
