"""Batches of one dataset each, from rows that say their dataset in a column.

``SketchCallback`` regroups the batches of a Trainer's loader by ``regroup``.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from merit_fast.errors import InputError

__all__ = ["CollatorWithIds", "OneDatasetBatches", "batches_of_one_dataset", "regroup"]

Order = Literal["random", "sequential"]

_ROWS_SORTED_AT_ONCE = 50  # batches; as in transformers' LengthGroupedSampler
_KEPT = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)

logger = logging.getLogger(__name__)


class OneDatasetBatches(Sampler[list[int]]):
    """Batches of row numbers in which every row stands once and every batch is of one dataset.

    The rows of a dataset that fill no whole batch make one smaller batch. The order depends on
    ``seed`` and epoch only, so a run that resumes within an epoch skips what it has seen.

    Args:
        ids: each row's dataset.
        batch_size: rows of a batch.
        seed: seed of the shuffling.
        order: "random" shuffles rows and batches; "sequential" fills batches in the order of rows.
        lengths: each row's length; given, a batch holds rows of similar length.
        drop_last: leaves out the smaller batches, and the last ones that do not suffice for all
            processes.
        num_processes: processes that take the batches in turn. Batches are cut in two until their
            number is a multiple of it, so that no process repeats one.

    Raises:
        InputError: ``drop_last`` would leave out all rows of a dataset.
    """

    def __init__(
        self,
        ids: Sequence[Hashable],
        batch_size: int,
        seed: int = 0,
        *,
        order: Order = "random",
        lengths: Sequence[int] | None = None,
        drop_last: bool = False,
        num_processes: int = 1,
    ) -> None:
        self.ids = ids
        self.seed = seed
        self.order = order
        self.lengths = lengths
        self.num_processes = num_processes
        self.epoch = 0
        # Not ``batch_size`` and ``drop_last``: accelerate takes batches of these names to be full.
        self.rows_per_batch = batch_size
        self.full_only = drop_last
        self.counts = Counter(ids)
        small = [str(name) for name, count in self.counts.items() if count < batch_size]
        if drop_last and (small or not len(self)):
            reason = ", ".join(sorted(small)[:3]) or f"fewer than {num_processes} batches"
            raise InputError(
                f"dataloader_drop_last: must be false unless each dataset has {batch_size} rows, "
                f"a batch, and each process a batch; got {reason}"
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def __len__(self) -> int:
        round_up = math.floor if self.full_only else math.ceil
        number = sum(round_up(count / self.rows_per_batch) for count in self.counts.values())
        if self.full_only:
            return number - number % self.num_processes
        return min(number + -number % self.num_processes, len(self.ids))

    @property
    def num_left_out(self) -> int:
        """Rows that are in no batch of an epoch."""
        return len(self.ids) - len(self) * self.rows_per_batch if self.full_only else 0

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        batches = self._cut(self._filled(self._ordered(generator)))
        if self.order == "random":
            batches = [batches[i] for i in generator.permutation(len(batches))]
        return iter(batches[: len(self)])

    def _ordered(self, generator: np.random.Generator) -> Iterable[int]:
        if self.order == "sequential":
            return range(len(self.ids))
        rows: list[int] = generator.permutation(len(self.ids)).tolist()
        if self.lengths is None:
            return rows
        by_dataset: dict[Hashable, list[int]] = {}
        for row in rows:
            by_dataset.setdefault(self.ids[row], []).append(row)
        lengths = self.lengths
        part = _ROWS_SORTED_AT_ONCE * self.rows_per_batch
        return [
            row
            for rows in by_dataset.values()
            for start in range(0, len(rows), part)
            for row in sorted(rows[start : start + part], key=lambda row: -lengths[row])
        ]

    def _filled(self, rows: Iterable[int]) -> list[list[int]]:
        """Fills one open batch per dataset; those that stay open come last."""
        batches = []
        opened: dict[Hashable, list[int]] = {}
        for row in rows:
            batch = opened.setdefault(self.ids[row], [])
            batch.append(row)
            if len(batch) == self.rows_per_batch:
                batches.append(opened.pop(self.ids[row]))
        return batches if self.full_only else [*batches, *opened.values()]

    def _cut(self, batches: list[list[int]]) -> list[list[int]]:
        """Cuts the largest batches in two until their number suits the processes."""
        for _ in range(len(self) - len(batches)):
            largest = max(range(len(batches)), key=lambda i: len(batches[i]))
            batch = batches[largest]
            half = (len(batch) + 1) // 2
            batches[largest : largest + 1] = [batch[:half], batch[half:]]
        return batches


def batches_of_one_dataset(ids: Sequence[Hashable], batch_size: int, seed: int = 0) -> list[int]:
    """Orders rows into shuffled batches of ``batch_size`` rows of one dataset each.

        rows = rows.select(batches_of_one_dataset(rows["dataset_id"], 8))

    It is for training stacks that take rows in their order. Leaves out the rows that fill no batch,
    fewer than ``batch_size`` per dataset, and logs their number.
    """
    named = list(ids)
    batches = OneDatasetBatches(named, batch_size, seed)
    order = [row for batch in batches if len(batch) == batch_size for row in batch]
    if len(order) < len(named):
        logger.warning(
            "%d of %d rows fill no batch of one dataset and are left out",
            len(named) - len(order),
            len(named),
        )
    return order


class CollatorWithIds:
    """Hides the ids from a collator and adds them to its batch; workers can load the class."""

    def __init__(self, collator: Callable[[list[Any]], Any], column: str) -> None:
        self.collator = collator
        self.column = column

    def __call__(self, rows: list[Any]) -> Any:
        ids = [row_id(row, self.column) for row in rows]
        if len(set(ids)) > 1:
            raise InputError(
                f"train_dataset: {self.column}: a batch must be of one dataset, got "
                f"{', '.join(sorted(set(ids))[:3])}; leave out sampler='as given', take "
                "per_device_train_batch_size=1, or rows ordered by batches_of_one_dataset"
            )
        batch = self.collator(
            [{key: value for key, value in row.items() if key != self.column} for row in rows]
        )
        batch[self.column] = ids
        return batch


def row_id(row: Any, column: str) -> str:
    """Name of a row's dataset.

    Raises:
        InputError: the row is no mapping, lacks the column, or has neither a str nor an int there.
    """
    if not isinstance(row, Mapping) or column not in row:
        raise InputError(
            f"train_dataset: {column}: is missing in a row; every row must say its dataset"
        )
    return _name(row[column], column)


def _name(value: Any, column: str) -> str:
    value = value.item() if isinstance(value, Tensor | np.generic) else value
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(
            f"train_dataset: {column}: must be a non-empty str or an int, got {value!r}"
        )
    return str(value)


def dataset_ids(dataset: Any, column: str) -> list[str]:
    """Reads the dataset of every row: a column of ``datasets``, otherwise row by row."""
    if hasattr(dataset, "column_names") and hasattr(dataset, "with_format"):
        values = dataset.with_format(None)[column]
        return [_name(value, column) for value in values]
    return [row_id(dataset[i], column) for i in range(len(dataset))]


def regroup(
    loader: "DataLoader[Any]", column: str, seed: int, num_processes: int
) -> "DataLoader[Any]":
    """Replaces the batches of a Trainer's loader by batches of one dataset.

    Random order, sequential order and grouping by length are kept within these batches.

    Raises:
        InputError: the loader has a sampler or batch sampler of another kind.
    """
    sampler = loader.sampler
    if loader.batch_size is None:
        raise _other_sampler(loader.batch_sampler)
    options: dict[str, Any] = {}
    if type(sampler) is LengthGroupedSampler:
        options["lengths"] = sampler.lengths
    elif type(sampler) is SequentialSampler:
        options["order"] = "sequential"
    elif type(sampler) is not RandomSampler or sampler.replacement:
        raise _other_sampler(sampler)
    batches = OneDatasetBatches(
        dataset_ids(loader.dataset, column),
        loader.batch_size,
        seed,
        drop_last=loader.drop_last,
        num_processes=num_processes,
        **options,
    )
    if batches.num_left_out:
        logger.warning(
            "dataloader_drop_last: %d of %d rows fill no batch of one dataset and are left out",
            batches.num_left_out,
            len(batches.ids),
        )
    kept = {name: getattr(loader, name) for name in _KEPT}
    return DataLoader(loader.dataset, batch_sampler=batches, **kept)


def _other_sampler(sampler: Any) -> InputError:
    return InputError(
        "SketchCallback: train_sampling_strategy: must be random, sequential or group_by_length, "
        f"got a {type(sampler).__name__}; attach(trainer, sampler='as given') keeps its batches"
    )
