"""Takes the rows of every group from the mixture and the split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from merit_fast.data import Dataset
from merit_fast.data.config import DatasetConfig, Part
from merit_fast.data.mixture.select import Selection
from merit_fast.data.store.examples import StoredExamples
from merit_fast.export.rows import PartRows
from merit_fast.pipeline.arms import Branch, plan_branches
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.progress import Progress


@dataclass(frozen=True)
class Group:
    """The rows of one group, and their number, tokens and tokens in the loss in one epoch."""

    number: int
    train: tuple[PartRows, ...]
    held_out: tuple[PartRows, ...]
    num_examples: int
    num_tokens: int
    num_target_tokens: int


def groups_of(outputs: Outputs, progress: Progress) -> list[Group]:
    """The groups of the split, with the rows on which a run trains their branches.

    A row that gives no example, such as one that ``data.too_long`` drops, is in no group.

    Raises:
        InputError: a source is unreadable or breaks a rule of the mixture.
        MeritFastError: the split is not there.
    """
    planned = plan_branches(outputs.config, outputs.split_manifest, outputs.contents)
    branches = [branch for branch in planned if branch.arm == "merit" and not branch.seed]
    return rows_of_branches(branches, RunData(outputs, progress))


def rows_of_branches(branches: Iterable[Branch], data: RunData) -> list[Group]:
    """The rows of each branch, training and held-out ones.

    Raises:
        InputError: a source is unreadable or breaks a rule of the mixture.
    """
    config = data.config
    entries = {entry.name: entry for entry in config.mixture}
    held_out = _part_rows(data, "eval", entries)
    train = data.rows.select("train")
    groups = []
    for branch in branches:
        chosen = branch.choose(data.train, config.split)
        parts = tuple(
            PartRows(entries[one.name], config.data, "train", _numbers(one, train[one.name]))
            for one in chosen
            if one.num_examples
        )
        kept = tuple(held_out[part.name] for part in parts if part.name in held_out)
        groups.append(
            Group(
                branch.group,
                parts,
                kept,
                num_examples=sum(dataset.num_examples for dataset in chosen),
                num_tokens=sum(dataset.num_tokens for dataset in chosen),
                num_target_tokens=sum(dataset.num_target_tokens for dataset in chosen),
            )
        )
    return groups


def _part_rows(
    data: RunData, part: Part, entries: Mapping[str, DatasetConfig]
) -> dict[str, PartRows]:
    """Dataset -> its rows of one part, those that give an example."""
    selections = data.rows.select(part)
    found = {}
    for dataset in data.load(part) if selections else ():
        numbers = _numbers(dataset, selections[dataset.name])
        found[dataset.name] = PartRows(entries[dataset.name], data.config.data, part, numbers)
    return found


def _numbers(dataset: Dataset, selection: Selection) -> tuple[int, ...]:
    """Ascending numbers of the examples' rows in the source; a repeated row is there again.

    A row may give several examples, and ``weight`` may repeat each of them.
    """
    examples = dataset.examples
    assert isinstance(examples, StoredExamples)
    _, first, times = np.unique(examples.places, return_index=True, return_counts=True)
    repeats = np.zeros(len(selection.rows), np.int64)
    np.maximum.at(repeats, examples.rows[first], times)
    return tuple(np.repeat(selection.rows, repeats).tolist())
