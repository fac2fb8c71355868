"""Checks that every answer of a mixture ends in a token at which the trained model stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.dataset import IGNORED_LABEL, Dataset, Example
from merit_fast.data.rows.loss import train_on_of
from merit_fast.data.template import end_token_ids, with_template
from merit_fast.errors import InputError


def require_stops(
    datasets: Sequence[Dataset],
    configs: Sequence[DatasetConfig],
    data_config: DataConfig,
    tokenizer: Any,
) -> None:
    """Checks the last trained token of every answer.

    A dataset that trains turns of other roles than the assistant is not checked: nobody generates
    these turns. An answer that ends at `data.max_length` may have been cut, and is not checked.

    Args:
        datasets: of ``load_mixture``.
        configs: the entries of `mixture:`.
        data_config: the `data:` section.
        tokenizer: a fast tokenizer, or a processor that holds one.

    Raises:
        InputError: an answer ends in another token; the message names dataset and token.
    """
    tokenizer = with_template(tokenizer, data_config)
    train_on = {config.name: train_on_of(config, data_config) for config in configs}
    stops = end_token_ids(tokenizer, data_config)
    for dataset in datasets:
        if train_on[dataset.name] not in ("all", "last", ("assistant",)):
            continue
        for token_id in last_answer_ids(dataset.examples, data_config.max_length).tolist():
            if token_id not in stops:
                names = ", ".join(repr(tokenizer.decode([stop])) for stop in stops)
                raise InputError(
                    f"dataset {dataset.name}: every answer must end in a token at which the model "
                    f"stops ({names}), got {tokenizer.decode([token_id])!r}"
                )


def last_answer_ids(examples: Sequence[Example], max_length: int) -> np.ndarray[Any, Any]:
    """[U] distinct ids with which answers end before position ``max_length``, ascending.

    Args:
        examples: of a dataset; those of a store are not made one by one.
        max_length: `data.max_length`.
    """
    if hasattr(examples, "last_answer_ids"):
        return np.asarray(examples.last_answer_ids(max_length))
    found = [np.zeros(0, np.int64)]
    for example in examples:
        is_target = example.labels != IGNORED_LABEL
        ends = np.flatnonzero(is_target & ~np.append(is_target[1:], False))
        found.append(example.input_ids[ends[ends + 1 < max_length]].astype(np.int64))
    return np.unique(np.concatenate(found))
