"""The batches of every optimizer step, padded or packed."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from merit_fast.data import Batch, Example, collate, pack
from merit_fast.data.dataset import ChainedExamples
from merit_fast.data.tree import expand
from merit_fast.train.config import TrainConfig
from merit_fast.train.packing import PackedSchedule
from merit_fast.train.schedule import count_tokens, step_examples

Texts = tuple[Sequence[Example], Sequence[int]]  # texts, and the dataset of each


class Schedule:
    """The micro-batches of every step of a run.

    Args:
        examples: the rows of a branch.
        config: the recipe.
        row_length: tokens of the longest packed row; None: no limit.
        padding: the id that fills padded batches.
        expands: the model reads the texts of a tree one by one; they stay in one batch.
        num_parts: padded micro-batches are cut into so many, one for each process.
    """

    def __init__(
        self,
        examples: ChainedExamples,
        config: TrainConfig,
        row_length: int | None,
        padding: int,
        expands: bool = False,
        num_parts: int = 1,
    ) -> None:
        self.examples = examples
        self.config = config
        self.padding = padding
        self.expands = expands
        self.num_batches = config.accumulation * num_parts
        self.lengths = _expanded_lengths(examples) if expands else examples.lengths
        self.packed = PackedSchedule(self.lengths, config, row_length) if config.packing else None

    def count_tokens(self, steps: int) -> int:
        """Tokens that pass through the model in ``steps`` steps."""
        if self.packed is not None:
            return self.packed.count_tokens(steps)
        return count_tokens(self.lengths, steps, self.config)

    def num_examples(self, step: int) -> int:
        """Examples of one step; a tree counts as one."""
        if self.packed is not None:
            return sum(len(row) for row in self.packed.rows(step))
        return len(step_examples(step, len(self.examples), self.config))

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of one step."""
        if self.packed is not None:
            rows = [self._texts(row) for row in self.packed.rows(step)]
            return [pack(texts, ids) for texts, ids in rows]
        chosen = step_examples(step, len(self.examples), self.config)
        return micro_batches([self._texts([i]) for i in chosen], self.num_batches, self.padding)

    def _texts(self, indices: Iterable[int] | npt.NDArray[np.int64]) -> Texts:
        texts = []
        ids = []
        for index in indices:
            example = self.examples[int(index)]
            new = expand(example) if self.expands else [example]
            texts += new
            ids += [self.examples.dataset_of(int(index))] * len(new)
        return texts, ids


def micro_batches(examples: Sequence[Texts], num_batches: int, padding: int) -> list[Batch]:
    """The examples of one step in ``num_batches`` padded batches, or fewer.

    Args:
        examples: each as its texts, which stay in one batch, with the number of their dataset.
        num_batches: the most batches.
        padding: the id that fills the batches.
    """
    size = -(-len(examples) // num_batches)
    batches = []
    for first in range(0, len(examples), size):
        chosen = examples[first : first + size]
        rows = [text for texts, _ in chosen for text in texts]
        batches.append(collate(rows, [number for _, ids in chosen for number in ids], padding))
    return batches


def _expanded_lengths(examples: ChainedExamples) -> npt.NDArray[np.int64]:
    """[N] tokens of each example's texts."""
    lengths = examples.lengths.copy()
    for index in examples.tree_indices.tolist():
        lengths[index] = sum(len(text.input_ids) for text in expand(examples[index]))
    return lengths
