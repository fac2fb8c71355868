"""The examples of one update: their datasets, losses, lengths and blocks, each checked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.errors import InputError, MeritFastError
from merit_fast.manifests.sketch_state import SketchState, Weight
from merit_fast.sketch.passes.parts import Sketches

DatasetId = str | int


class NotFiniteError(MeritFastError):
    """The gradient of one example holds NaN or infinity.

    Attributes:
        example: its number in the batch.
    """

    def __init__(self, dataset: DatasetId, example: int) -> None:
        super().__init__(
            f"sketch_gradients: example {example} of the batch, of dataset {dataset!r}: must have "
            "a finite gradient, found NaN or infinity"
        )
        self.example = example


def require_finite(sketches: Tensor, dataset_ids: Sequence[DatasetId]) -> None:
    """Raises NotFiniteError at the first example [B, D] that holds NaN or infinity."""
    wrong = (~sketches.isfinite().all(1)).nonzero()
    if len(wrong):
        example = int(wrong[0])
        raise NotFiniteError(dataset_ids[example], example)


@dataclass(frozen=True)
class UpdatedExamples:
    """B examples as ``update`` gets them; lists of B, or empty where they were not given."""

    dataset_ids: list[DatasetId]
    loss_sums: list[float]
    num_target_tokens: list[int]
    blocks: list[int]

    @classmethod
    def of(
        cls, dataset_ids: Any, loss_sums: Any, num_target_tokens: Any, blocks: Any
    ) -> "UpdatedExamples":
        """Lists of sequences, tensors and None."""
        return cls(*map(_listed, (dataset_ids, loss_sums, num_target_tokens, blocks)))

    def check(
        self, num_rows: int, row_examples: Sequence[int] | None, weight: Weight, num_blocks: int
    ) -> None:
        """Raises InputError if a list is not one per example, or a value breaks its rule."""
        size = num_rows if row_examples is None else len(set(row_examples))
        if row_examples is not None and len(row_examples) != num_rows:
            raise InputError(f"row_examples: must be {num_rows} numbers, got {len(row_examples)}")
        for key, values in vars(self).items():
            if (values or key == "dataset_ids") and len(values) != size:
                raise InputError(f"{key}: must be one per example ({size}), got {len(values)}")
        if weight == "tokens" and not self.num_target_tokens:
            raise InputError(
                "num_target_tokens: must be given with weight 'tokens': an example counts as many "
                "times as it has target tokens"
            )
        least = 1 if weight == "tokens" else 0
        for number in self.num_target_tokens:
            if int(number) != number or number < least:
                raise InputError(
                    f"num_target_tokens: must be whole numbers from {least} on, got {number}"
                )
        for block in self.blocks:
            if int(block) != block or not 0 <= block < num_blocks:
                raise InputError(f"blocks: must be from 0 to {num_blocks - 1}, got {block}")

    def add_all(
        self,
        sketches: Sketches,
        states_of: Callable[[DatasetId], tuple[SketchState, Mapping[str, SketchState]]],
    ) -> None:
        """Adds all examples to the states of their datasets, and to those of the parts."""
        for dataset in dict.fromkeys(self.dataset_ids):
            state, of_parts = states_of(dataset)
            self.add_to(state, sketches.whole, dataset)
            for part, of_part in of_parts.items():
                self.add_to(of_part, sketches.parts[part], dataset)

    def add_to(self, state: SketchState, sketches: Tensor, dataset: DatasetId) -> None:
        """Adds one dataset's examples to its state, in turn to the blocks if none were given."""
        rows = [row for row, other in enumerate(self.dataset_ids) if other == dataset]
        if self.blocks:
            blocks = torch.tensor([self.blocks[row] for row in rows])
        else:
            blocks = (state.num_examples + torch.arange(len(rows))) % len(state.block_counts)
        loss = float(sum(self.loss_sums[row] for row in rows)) if self.loss_sums else 0.0
        tokens = None
        if self.num_target_tokens:
            tokens = torch.tensor([int(self.num_target_tokens[row]) for row in rows])
        state.add_examples(sketches[rows], blocks, loss, tokens)


def one_dataset(
    dataset_id: DatasetId | Sequence[DatasetId] | Tensor, count: int | None
) -> tuple[DatasetId, int]:
    """The one dataset of a pass and its number of examples; None counts the ids."""
    if isinstance(dataset_id, Tensor):
        dataset_id = dataset_id.tolist()
    ids = [dataset_id] if isinstance(dataset_id, str | int) else list(dataset_id)
    if count is None and isinstance(dataset_id, str | int):
        raise MeritFastError(
            f"sketch: update({dataset_id!r}): count, the number of examples, is required"
        )
    count = len(ids) if count is None else count
    names = sorted({str(dataset) for dataset in ids})
    if len(names) != 1:
        listed = ", ".join(names[:3]) or "none"
        raise MeritFastError(
            f"sketch: sketch_sums needs the examples of one dataset per backward pass, got {listed}"
        )
    if count < 1:
        raise MeritFastError(f"sketch: update({ids[0]!r}): count must be at least 1, got {count}")
    return ids[0], count


def _listed(values: Sequence[Any] | Tensor | None) -> list[Any]:
    return [] if values is None else values.tolist() if isinstance(values, Tensor) else list(values)
