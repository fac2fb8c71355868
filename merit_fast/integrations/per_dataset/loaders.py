"""Loaders of a Trainer whose batches tell the dataset of each token."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from merit_fast.integrations.per_dataset.checks import has_datasets
from merit_fast.integrations.per_dataset.codes import CODES, CollatorWithCodes


def wrap_loaders(trainer: Any, column: str) -> None:
    """Adds codes to the batches of training, and of evaluation where the rows tell their dataset.

    The column of datasets survives ``remove_unused_columns`` and never reaches the Trainer's own
    collator.
    """
    plain_train = trainer.get_train_dataloader
    plain_eval = trainer.get_eval_dataloader

    def get_train_dataloader() -> Any:
        with _datasets_kept(trainer, column):
            return plain_train()

    def get_eval_dataloader(eval_dataset: Any = None) -> Any:
        rows = trainer.eval_dataset if eval_dataset is None else eval_dataset
        rows = trainer.eval_dataset[rows] if isinstance(rows, str) else rows
        if not has_datasets(rows, column):
            return plain_eval(eval_dataset)
        with _datasets_kept(trainer, column, optional=True):
            return plain_eval(eval_dataset)

    trainer.get_train_dataloader = get_train_dataloader
    trainer.get_eval_dataloader = get_eval_dataloader


@contextmanager
def _datasets_kept(trainer: Any, column: str, optional: bool = False) -> Iterator[None]:
    trainer._set_signature_columns_if_needed()
    columns = trainer._signature_columns
    collator = trainer.data_collator
    trainer._signature_columns = [*columns, column, CODES]
    trainer.data_collator = CollatorWithCodes(collator, column, optional)
    try:
        yield
    finally:
        trainer._signature_columns = columns
        trainer.data_collator = collator
