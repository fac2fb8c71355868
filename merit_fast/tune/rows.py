"""Halves the held-out rows: one half chooses a merge's numbers, the other half reports."""

import hashlib
from collections.abc import Sequence

import numpy as np

from merit_fast.data import Dataset
from merit_fast.errors import InputError


def split_held_out(datasets: Sequence[Dataset]) -> tuple[list[Dataset], list[Dataset]]:
    """Returns the half of every dataset that chooses and the half that reports, in the rows' order.

        order = permutation(n) by the dataset's name
        chooses, reports = order[:n // 2], order[n // 2:]

    Raises:
        InputError: there is no dataset, or one has a single row.
    """
    if not datasets:
        raise InputError(
            "merge: scale auto, weights fit and train.patience need held-out rows; "
            "give datasets an eval_path or eval_split"
        )
    halves = [_halves(dataset) for dataset in datasets]
    return [chooses for chooses, _ in halves], [reports for _, reports in halves]


def _halves(dataset: Dataset) -> tuple[Dataset, Dataset]:
    count = dataset.num_examples
    if count < 2:
        raise InputError(
            f"{dataset.name}: scale auto, weights fit and train.patience need at least 2 held-out "
            f"rows per dataset (half of them choose, the others report), got {count}"
        )
    digest = hashlib.blake2b(f"held-out\n{dataset.name}".encode(), digest_size=8).digest()
    order = np.random.default_rng(int.from_bytes(digest, "little")).permutation(count)
    first, second = (
        dataset.select(np.sort(half)) for half in (order[: count // 2], order[count // 2 :])
    )
    return first, second
