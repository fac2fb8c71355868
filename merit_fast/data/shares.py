"""Cuts a dataset's rows: warm-up rows and the rest, and equal shares for the random control."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import Dataset
from merit_fast.errors import InputError


def warmup_rows(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Returns ``share`` of the rows, and the rest, each in the order of the rows.

        order = permutation(n) by (seed, name); cut = round(share * n)
        first, rest = order[:cut], order[cut:]

    Raises:
        InputError: no row is left for the rest.
    """
    order = _order(dataset, seed)
    cut = round(share * len(order))
    if cut >= len(order):
        raise InputError(
            f"{dataset.name}: a warm-up on {share:g} of {len(order)} rows leaves none "
            "for the sketch and the branches"
        )
    return _selected(dataset, order[:cut]), _selected(dataset, order[cut:])


def dealt_rows(dataset: Dataset, part: int, parts: int, seed: int) -> Dataset:
    """Returns one of ``parts`` equal shares, dealt in a random order of (seed, name).

    The rows keep their order. The share that is dealt first differs from name to name, so that the
    rows left over do not all fall to share 0.
    """
    order = _order(dataset, seed)
    first = (part + int(order.argmax())) % parts
    return _selected(dataset, order[first::parts])


def _order(dataset: Dataset, seed: int) -> NDArray[np.int64]:
    digest = hashlib.blake2b(f"rows\n{seed}\n{dataset.name}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(dataset.num_examples)


def _selected(dataset: Dataset, indices: NDArray[np.int64]) -> Dataset:
    return Dataset(dataset.name, tuple(dataset.examples[int(i)] for i in np.sort(indices)))
