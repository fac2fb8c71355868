"""Losses and greedy exact match of one model on tokenized rows."""

from collections.abc import Sequence

import torch
from torch import nn

from merit_fast.data import Dataset, Example, collate, count_target_tokens
from merit_fast.manifests.schemas import DatasetResult
from merit_fast.model import target_losses


def dataset_results(
    model: nn.Module, datasets: Sequence[Dataset], pad_token_id: int, batch_size: int
) -> dict[str, DatasetResult]:
    """Loss per target token and share of exact rows of every dataset.

    A row is exact if every target is the greedy choice. Greedy decoding writes such a row exactly,
    since each step then sees the targets before it, so no generation is needed. Batches join rows
    of similar length from all datasets.
    """
    examples = [example for dataset in datasets for example in dataset.examples]
    losses, exact = _row_sums(model, examples, pad_token_id, batch_size)
    results = {}
    first = 0
    for dataset in datasets:
        rows = slice(first, first + dataset.num_examples)
        first += dataset.num_examples
        tokens = dataset.num_target_tokens
        loss = float(losses[rows].sum()) / tokens
        exact_match = float(exact[rows].mean())
        results[dataset.name] = DatasetResult(loss, exact_match, tokens, dataset.num_examples)
    return results


def mean_loss(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int
) -> float:
    """Nats per target token over all rows."""
    losses, _ = _row_sums(model, examples, pad_token_id, batch_size)
    return float(losses.sum()) / sum(count_target_tokens(example.labels) for example in examples)


def _row_sums(
    model: nn.Module, examples: Sequence[Example], pad_token_id: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed losses [N] and exactness (0 or 1) [N] of the rows, both float64."""
    losses = torch.zeros(len(examples), dtype=torch.float64)
    wrong = torch.zeros(len(examples), dtype=torch.float64)
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = collate([examples[i] for i in rows], [0] * len(rows), pad_token_id)
        with torch.inference_mode():
            targets = target_losses(model, batch)
        row_of_target = torch.tensor(rows)[targets.example.cpu()]
        losses.index_add_(0, row_of_target, targets.loss.double().cpu())
        wrong.index_add_(0, row_of_target, (~targets.correct).double().cpu())
    return losses, (wrong == 0).double()
