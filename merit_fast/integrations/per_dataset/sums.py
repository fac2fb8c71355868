"""Counts and losses per dataset: sums only, so that ranks, windows and restarts add up."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from merit_fast.errors import InputError, one_line
from merit_fast.integrations.per_dataset.codes import BatchDatasets
from merit_fast.integrations.per_dataset.losses import TokenValues
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.manifests.atomic import write_text

COUNTS_FILE = "dataset_counts.json"


@dataclass
class DatasetSum:
    """Sums over the examples of one dataset.

    Attributes:
        loss_sum: summed loss of the target tokens, nats.
        num_target_tokens: tokens in the loss, after the shift.
        num_correct: target tokens that were the most likely token; -1: not known.
        num_tokens: tokens through the model, padding not.
        num_examples: examples, counted at their first token.
    """

    loss_sum: float = 0.0
    num_target_tokens: int = 0
    num_correct: int = 0
    num_tokens: int = 0
    num_examples: int = 0

    def add(self, other: "DatasetSum") -> None:
        """Adds another sum; the correct tokens stay known only if both know them."""
        unknown = self.num_correct < 0 or other.num_correct < 0
        for field in fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)
        if unknown:
            self.num_correct = -1


Sums = dict[str, DatasetSum]


def batch_sums(datasets: BatchDatasets, labels: Tensor, values: TokenValues) -> Sums:
    """Sums of one batch.

    Args:
        datasets: of the batch's tokens.
        labels: [B, T - 1] shifted, or [B, T] that came shifted; -100 is no target.
        values: losses at those places.
    """
    owners = datasets.of_tokens
    of_labels = owners if labels.shape == owners.shape else owners[:, 1:]
    is_target = labels != IGNORED_LABEL
    count = len(datasets.names)
    of_targets = of_labels[is_target]
    losses = torch.zeros(count, dtype=torch.float64, device=of_targets.device)
    losses.index_add_(0, of_targets, values.losses[is_target].double().to(losses.device))
    correct = [-1] * count
    if values.is_correct is not None:
        correct = of_targets[values.is_correct[is_target]].bincount(minlength=count).tolist()
    targets = of_targets.bincount(minlength=count).tolist()
    tokens = owners[owners >= 0].bincount(minlength=count).tolist()
    examples = owners[datasets.starts].bincount(minlength=count).tolist()
    columns = zip(losses.tolist(), targets, correct, tokens, examples, strict=True)
    named = zip(datasets.names, columns, strict=True)
    return {name: DatasetSum(*column) for name, column in named if column[3]}


def add_sums(total: Sums, more: Mapping[str, DatasetSum]) -> None:
    """Adds ``more`` to ``total``, dataset by dataset."""
    for name, value in more.items():
        total.setdefault(name, DatasetSum()).add(value)


def over_ranks(sums: Sums) -> Sums:
    """Sums of all ranks, on every rank; all must call it."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return sums
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sums)
    total: Sums = {}
    for of_rank in gathered:
        add_sums(total, of_rank)
    return total


def figures(sums: Sums, prefix: str) -> dict[str, float]:
    """Mean loss, accuracy and target tokens of each dataset, as a Trainer logs them.

    A dataset without target tokens has no mean and is left out.
    """
    logged: dict[str, float] = {}
    for name, value in sorted(sums.items()):
        if not value.num_target_tokens:
            continue
        logged[f"{prefix}loss/{name}"] = value.loss_sum / value.num_target_tokens
        if value.num_correct >= 0:
            logged[f"{prefix}accuracy/{name}"] = value.num_correct / value.num_target_tokens
        logged[f"{prefix}tokens/{name}"] = value.num_target_tokens
    return logged


@dataclass
class Counts:
    """Record of a training run up to a checkpoint.

    Attributes:
        sums: over all ranks, since the start.
        start_fingerprint: of the model that training started from.
        num_micro_batches: of one rank, since the start.
    """

    sums: Sums
    start_fingerprint: str
    num_micro_batches: int


def write_counts(folder: Path, counts: Counts) -> None:
    """Writes the counts of a training run next to its weights."""
    document = {
        "schema_version": 1,
        "start_fingerprint": counts.start_fingerprint,
        "num_micro_batches": counts.num_micro_batches,
        "datasets": {name: asdict(value) for name, value in sorted(counts.sums.items())},
    }
    write_text(folder / COUNTS_FILE, json.dumps(document, indent=2) + "\n")


def read_counts(folder: Path) -> Counts:
    """Reads the counts of a checkpoint.

    Raises:
        InputError: the file is absent or broken, so that a resumed run would count too few tokens.
    """
    file = folder / COUNTS_FILE
    if not file.is_file():
        raise InputError(
            f"{file}: is missing: the tokens that this run has trained on are not known; resume "
            "from a checkpoint that MeritCallback saved, or start again"
        )
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        sums = {name: DatasetSum(**value) for name, value in document["datasets"].items()}
        return Counts(sums, str(document["start_fingerprint"]), int(document["num_micro_batches"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: holds no counts per dataset ({one_line(error)})") from None


def total_of(sums: Iterable[DatasetSum]) -> DatasetSum:
    """Sum over datasets."""
    total = DatasetSum()
    for value in sums:
        total.add(value)
    return total
