"""Numbers the dataset of each token of a batch, whatever a collator does with the rows.

A code is ``2 * dataset + 1`` at the first token of an example, ``2 * dataset`` at its others and -1
at padding. A collator lays codes out as it lays out tokens: it collates the rows a second time with
codes in the place of ``input_ids``.
"""

import itertools
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merit_fast.errors import InputError
from merit_fast.integrations.one_dataset import row_id
from merit_fast.kernels.labels import IGNORED_LABEL

CODES = "merit_codes"  # of a packed row: a list of codes; of a batch: [B, T] int64
NAMES = "merit_names"  # of a batch: names of the datasets that its codes number
PADDING = -1
_OFFSET = 1 << 40  # above every token id, so that padding is told from codes


@dataclass(frozen=True)
class BatchDatasets:
    """Datasets of a batch's tokens.

    Attributes:
        codes: [B, T] int64.
        names: name of each dataset that the codes number.
    """

    codes: Tensor
    names: Sequence[str]

    @property
    def of_tokens(self) -> Tensor:
        """[B, T] int64 dataset of each token; -1 at padding."""
        return self.codes.div(2, rounding_mode="floor")

    @property
    def starts(self) -> Tensor:
        """[B, T] bool: first tokens of examples."""
        return (self.codes >= 0) & (self.codes % 2 == 1)


def example_codes(dataset: int, length: int) -> list[int]:
    """Codes of one example of ``length`` tokens."""
    return [2 * dataset + 1, *[2 * dataset] * (length - 1)][:length]


def take_datasets(inputs: dict[str, Any], names: Sequence[str] | None) -> BatchDatasets | None:
    """Removes the codes from a batch and returns them; None if the batch has none.

    Args:
        inputs: a batch of ``CollatorWithCodes``.
        names: names of the datasets that packed rows number; None: their numbers.
    """
    codes = inputs.pop(CODES, None)
    in_batch = inputs.pop(NAMES, None)
    if codes is None:
        return None
    if in_batch is not None:
        return BatchDatasets(codes, in_batch)
    count = int(codes.max()) // 2 + 1
    if names is None:
        return BatchDatasets(codes, [str(number) for number in range(count)])
    if count > len(names):
        raise InputError(
            f"train_dataset: {CODES}: must number one of {len(names)} datasets, got {count - 1}"
        )
    return BatchDatasets(codes, names)


class CollatorWithCodes:
    """Hides the datasets of rows from a collator and adds them to its batch, token by token."""

    def __init__(
        self, collator: Callable[[list[Any]], Any], column: str, optional: bool = False
    ) -> None:
        self.collator = collator
        self.column = column
        self.optional = optional  # rows that say no dataset give a batch without codes

    def __call__(self, packs: list[Any]) -> Any:
        """Collates rows, or lists of rows that become one line each, as axolotl packs them."""
        sizes = [len(pack) if isinstance(pack, list) else None for pack in packs]
        rows = [row for pack in packs for row in (pack if isinstance(pack, list) else [pack])]
        if self.optional and not any(self.column in row or CODES in row for row in rows):
            return self.collator(packs)
        own = [
            {key: value for key, value in row.items() if key not in (self.column, CODES)}
            for row in rows
        ]

        def collate(flat: list[Any]) -> Any:
            return self.collator(_in_packs(flat, sizes))

        batch = collate([dict(row) for row in own])
        if not isinstance(batch, MutableMapping):
            raise InputError(
                f"data_collator: {type(self.collator).__name__}: must give a batch with labels, as "
                "supervised training has; losses per dataset are those of a causal model"
            )
        if CODES in rows[0]:
            batch[CODES] = self._laid_out(own, [row[CODES] for row in rows], batch, collate)
            return batch
        ids = [row_id(row, self.column) for row in rows]
        names = sorted(set(ids))
        numbers = [names.index(name) for name in ids]
        if "input_ids" in rows[0]:
            lengths = [len(row["input_ids"]) for row in own]
            codes = [example_codes(*each) for each in zip(numbers, lengths, strict=True)]
            batch[CODES] = self._laid_out(own, codes, batch, collate)
        else:
            batch[CODES] = self._by_line(numbers, batch)
        batch[NAMES] = names
        return batch

    def _laid_out(
        self,
        own: list[Any],
        codes: list[list[int]],
        batch: Any,
        collate: Callable[[list[Any]], Any],
    ) -> Tensor:
        """Collates the codes as if they were tokens, and checks that they lie where tokens do."""
        again = collate(
            [
                {**row, "input_ids": _of_same_kind(values, row["input_ids"])}
                for row, values in zip(own, codes, strict=True)
            ]
        )
        laid_out = torch.where(again["input_ids"] >= _OFFSET, again["input_ids"] - _OFFSET, PADDING)
        same = laid_out.shape == batch["input_ids"].shape
        if same and "labels" in own[0] and not _made_of_tokens(again):
            same = torch.equal(again["labels"], batch["labels"])
        if same and "labels" in batch:
            same = bool((laid_out[batch["labels"] != IGNORED_LABEL] >= 0).all())
        if not same:
            raise InputError(
                f"data_collator: {type(self.collator).__name__}: must lay out the same rows in the "
                "same way each time, and keep the place of their tokens"
            )
        return laid_out

    def _by_line(self, numbers: list[int], batch: Any) -> Tensor:
        """Gives every line of the batch the dataset of its row; padding is what its mask hides."""
        shape = batch["labels"].shape if "labels" in batch else batch["input_ids"].shape
        if shape[0] != len(numbers):
            raise InputError(
                f"train_dataset: input_ids: are missing in a row; the {len(numbers)} rows of a "
                f"batch became {shape[0]} lines, so that no line tells its dataset"
            )
        codes = 2 * torch.tensor(numbers)[:, None].repeat(1, shape[1])
        mask = batch.get("attention_mask")
        is_token = torch.ones(shape, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.shape == shape:
            is_token = mask != 0
        codes += is_token & (is_token.cumsum(1) == 1)  # the first token of each line
        return torch.where(is_token, codes, PADDING)


def _in_packs(rows: list[Any], sizes: Sequence[int | None]) -> list[Any]:
    """Puts rows into lists of these sizes; None: the row itself."""
    remaining = iter(rows)
    return [
        next(remaining) if size is None else list(itertools.islice(remaining, size))
        for size in sizes
    ]


def _made_of_tokens(batch: Any) -> bool:
    """Tells whether a collator copies labels from tokens; codes are no row's own labels."""
    return "labels" not in batch or bool((batch["labels"] >= _OFFSET).any())


def _of_same_kind(codes: list[int], tokens: Any) -> Any:
    if len(codes) != len(tokens):
        raise InputError(
            f"train_dataset: {CODES}: must have a code per token, got {len(codes)} codes for "
            f"{len(tokens)} tokens"
        )
    shifted = [_OFFSET + code for code in codes]
    if isinstance(tokens, Tensor):
        return torch.tensor(shifted)
    return np.array(shifted) if isinstance(tokens, np.ndarray) else shifted
