"""Counts of examples and tokens of a training run, kept with its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import InputError, MeritFastError
from merit_fast.kernels.labels import IGNORED_LABEL
from merit_fast.manifests.atomic import write_text
from merit_fast.options.parser import parse

COUNTS_FILE = "merit_counts.json"


@dataclass(frozen=True)
class StackCounts:
    """Examples and tokens that a model has been trained on, epochs counted."""

    num_examples: int = 0
    num_tokens: int = 0
    num_target_tokens: int = 0

    def __add__(self, other: StackCounts) -> StackCounts:
        return StackCounts(
            self.num_examples + other.num_examples,
            self.num_tokens + other.num_tokens,
            self.num_target_tokens + other.num_target_tokens,
        )


def count_batch(inputs: Mapping[str, Any]) -> StackCounts:
    """Counts one batch of a causal language model.

    Args:
        inputs: keyword arguments of the model: input_ids and labels of [B, T]; attention_mask of
            [B, T], 0 at padding, or None; position_ids of [B, T], which restart at every example
            of a packed row, or None.

    Returns:
        Examples, tokens without padding, and labels that are predicted: all but the first of a
        row, where they are not -100. ``shift_labels`` are taken as they are.

    Raises:
        MeritFastError: the batch has no labels, so that the model computes no loss.
    """
    shifted = inputs.get("shift_labels")
    labels = inputs.get("labels")
    if shifted is None and labels is None:
        raise MeritFastError(
            "merit_fast: a training batch has no labels, so tokens in the loss cannot be counted "
            "(label smoothing and losses outside the model take them away)"
        )
    targets = labels[..., 1:] if shifted is None else shifted  # type: ignore[index]
    ids: Tensor | None = inputs.get("input_ids")
    if ids is None:
        ids = shifted if labels is None else labels
    shape = ids.shape  # type: ignore[union-attr]
    mask = inputs.get("attention_mask")
    real = torch.ones(shape, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        real = mask.ne(0)
    return StackCounts(
        _num_examples(inputs.get("position_ids"), real),
        int(real.sum()),
        int((targets != IGNORED_LABEL).sum()),
    )


def _num_examples(positions: Any, real: Tensor) -> int:
    """Rows of the batch, or the examples of packed rows by their first positions."""
    if isinstance(positions, Tensor) and positions.shape[-2:] == real.shape[-2:]:
        flat = positions if positions.dim() == 2 else positions[0]
        starts = int(((flat == 0) & real.to(flat.device)).sum())
        if starts:
            return starts
    return int(real.shape[0])


def over_all_ranks(counts: StackCounts, device: torch.device) -> StackCounts:
    """The sums over the processes of a distributed run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts
    values = torch.tensor(list(asdict(counts).values()), dtype=torch.int64, device=device)
    torch.distributed.all_reduce(values)
    return StackCounts(*(int(value) for value in values))


def write_counts(folder: Path, counts: StackCounts) -> None:
    """Writes the counts next to a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / COUNTS_FILE, json.dumps(asdict(counts)) + "\n")


def read_counts(folder: Path) -> StackCounts:
    """Reads the counts of a checkpoint.

    Raises:
        InputError: the file is absent or damaged.
    """
    file = folder / COUNTS_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{file}: is not there: the checkpoint was saved without merit_fast, so that its "
            "tokens are not known; train from the beginning, or without branch.json"
        ) from None
    except ValueError as error:
        raise InputError(f"{file}: is not readable JSON ({error})") from None
    return parse(StackCounts, values, str(file))
