"""The examples that stand for a dataset, and the fingerprint of what its sums depend on."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from merit_fast.data import Dataset
from merit_fast.data.shares import draw_rows
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION
from merit_fast.manifests.io import fingerprint
from merit_fast.options.parser import to_plain
from merit_fast.sketch.config import SketchConfig

_NO_SUM = ("check", "uncovered", "store", "store_dim")  # options that change no sum


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Chooses up to ``config.examples`` examples, at random by the seed and the dataset's content.

    With "all" the order is the same, and every example is in it.

        rank = permutation(number of rows in the source) by (seed, content)
        chosen = the first examples in the order of (rank of their row, place)

    So the draw is known before a row is tokenized. A dataset that does not know its source's
    content is drawn by the content of its examples.
    """
    if dataset.num_examples < 2:
        raise InputError(
            f"{dataset.name}: split needs at least 2 examples per dataset, "
            f"got {dataset.num_examples}"
        )
    if dataset.content is None or dataset.num_rows is None:
        content = content_of(dataset, range(dataset.num_examples))
        order = draw_rows(content, config.seed, dataset.num_examples)
    else:
        rank = np.argsort(draw_rows(dataset.content, config.seed, dataset.num_rows))
        order = np.argsort(rank[dataset.rows], kind="stable")
        _, first = np.unique(dataset.places[order], return_index=True)
        order = order[np.sort(first)]  # an example that a weight repeats is drawn once
    count = None if config.examples == "all" else config.examples
    return [int(index) for index in order[:count]]


def sums_fingerprint(
    dataset: Dataset,
    indices: list[int],
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
) -> str:
    """Fingerprint of everything that a dataset's file of sums depends on."""
    rows = content_of(dataset, indices)
    media = [dataset.examples[index].media for index in indices]
    images = [item.fingerprint() for item in media if item is not None]
    more: list[object] = [] if freeze is None else [{"freeze": list(freeze)}]
    more += [{"images": images}] if images else []
    options = {key: value for key, value in to_plain(config).items() if key not in _NO_SUM}
    return fingerprint([HASH_VERSION, model_fingerprint, options, rows, *more])


def rows_fingerprint(dataset: Dataset, indices: list[int], sums: str, config: SketchConfig) -> str:
    """Fingerprint of everything that a dataset's stored rows depend on.

    Args:
        dataset: the rows.
        indices: those that are sketched.
        sums: the fingerprint of their sums.
        config: of the sketch stage.
    """
    numbers = dataset.source_rows[indices].tolist()
    return fingerprint([sums, config.store_dim, numbers, places_in_rows(dataset)[indices].tolist()])


def places_in_rows(dataset: Dataset) -> NDArray[np.int64]:
    """[N] number of each example among the examples of its row, from 0."""
    rows = dataset.rows
    if not len(rows):
        return rows
    first = np.full(int(rows.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, rows, dataset.places)
    return np.asarray(dataset.places - first[rows])


def content_of(dataset: Dataset, indices: Sequence[int]) -> str:
    rows = hashlib.sha256()
    for index in indices:
        example = dataset.examples[index]
        tree = () if example.tree is None else (example.tree.starts, example.tree.parents)
        for array in (example.input_ids, example.labels, *tree):
            rows.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return rows.hexdigest()
