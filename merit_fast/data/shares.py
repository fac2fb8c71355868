"""Cuts a dataset's rows: warm-up rows and the rest, equal shares, and shares to mix in.

The cuts depend on a seed and a key. A run takes the fingerprint of the dataset's content as the
key, so that a renamed dataset is cut as before.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from merit_fast.data.dataset import Dataset
from merit_fast.errors import InputError


def warmup_rows(
    dataset: Dataset, share: float, seed: int, key: str | None = None
) -> tuple[Dataset, Dataset]:
    """Returns ``share`` of the rows, and the rest, each in the order of the rows.

        order = permutation(n) by (seed, key); cut = round(share * n)
        first, rest = order[:cut], order[cut:]

    Args:
        dataset: the rows to cut.
        share: part of the rows that comes first, from 0 to 1.
        seed: seed of the order.
        key: text that the order depends on, next to the seed; None: the dataset's name.

    Raises:
        InputError: no row is left for the rest.
    """
    order = _order(dataset.num_examples, seed, dataset.name if key is None else key)
    cut = round(share * len(order))
    if cut >= len(order):
        raise InputError(
            f"{dataset.name}: a warm-up on {share:g} of {len(order)} rows leaves none "
            "for the sketch and the branches"
        )
    return dataset.select(np.sort(order[:cut])), dataset.select(np.sort(order[cut:]))


def dealt_rows(
    dataset: Dataset, part: int, parts: int, seed: int, key: str | None = None
) -> Dataset:
    """Returns one of ``parts`` equal shares, dealt in a random order of (seed, key).

    The rows keep their order. The share that is dealt first differs from key to key, so that the
    rows left over do not all fall to share 0.

    Args:
        dataset: the rows to deal.
        part: number of the share, from 0.
        parts: number of shares.
        seed: seed of the order.
        key: text that the order depends on, next to the seed; None: the dataset's name.
    """
    chosen = _dealt(dataset.num_examples, part, parts, seed, dataset.name if key is None else key)
    return dataset.select(np.sort(chosen))


def mixed_rows(
    dataset: Dataset, fraction: float, part: int, parts: int, seed: int, key: str
) -> Dataset:
    """Returns ``fraction`` of the rows; up to 1 / ``parts`` no row goes to two of them.

        order = permutation(n) by (seed, key); first = part * n // parts
        chosen = order[(first + i) % n] for i below round(fraction * n)

    Args:
        dataset: the rows to choose from; the chosen ones keep their order.
        fraction: part of the rows, from 0 to 1.
        part: number of the branch that gets them, from 0.
        parts: number of branches.
        seed: seed of the order.
        key: text that the order depends on, next to the seed.
    """
    order = _order(dataset.num_examples, seed, key)
    count = num_mixed_rows(dataset.num_examples, fraction)
    first = part * len(order) // parts
    return dataset.select(np.sort(np.roll(order, -first)[:count]))


def num_mixed_rows(num_examples: int, fraction: float) -> int:
    """Number of rows that ``mixed_rows`` returns."""
    return round(fraction * num_examples)


def draw_rows(content: str, seed: int, num_rows: int) -> NDArray[np.int64]:
    """Numbers of all rows in the order in which a sketch draws them.

    Args:
        content: fingerprint of the rows' conversations.
        seed: seed of the draw.
        num_rows: number of rows.
    """
    digest = hashlib.blake2b(f"{seed}\n{content}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(num_rows)


def num_dealt_rows(num_examples: int, part: int, parts: int, seed: int, key: str) -> int:
    """Number of rows in a share of ``dealt_rows``, found without the rows."""
    return len(_dealt(num_examples, part, parts, seed, key))


def _dealt(num_examples: int, part: int, parts: int, seed: int, key: str) -> NDArray[np.int64]:
    order = _order(num_examples, seed, key)
    first = (part + int(order.argmax())) % parts
    return order[first::parts]


def _order(num_examples: int, seed: int, key: str) -> NDArray[np.int64]:
    digest = hashlib.blake2b(f"rows\n{seed}\n{key}".encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little")).permutation(num_examples)
