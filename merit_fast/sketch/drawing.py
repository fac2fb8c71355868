"""The examples that stand for a dataset, and the fingerprint of what its sums depend on."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from merit_fast.data import Dataset
from merit_fast.data.shares import draw_rows
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION
from merit_fast.manifests.io import fingerprint
from merit_fast.options.parser import to_plain
from merit_fast.sketch.config import SketchConfig


def choose_examples(dataset: Dataset, config: SketchConfig) -> list[int]:
    """Chooses up to ``config.examples`` examples, at random by the seed and the dataset's content.

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
    return [int(index) for index in order[: config.examples]]


def sums_fingerprint(
    dataset: Dataset,
    indices: list[int],
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
    preconditioner: str | None = None,
) -> str:
    """Fingerprint of everything that a dataset's file of sums depends on.

    ``preconditioner``: of ``preconditioner_fingerprint``.
    """
    rows = content_of(dataset, indices)
    media = [dataset.examples[index].media for index in indices]
    images = [item.fingerprint() for item in media if item is not None]
    more: list[object] = [] if freeze is None else [{"freeze": list(freeze)}]
    more += [{"images": images}] if images else []
    more += [] if preconditioner is None else [{"preconditioner": preconditioner}]
    # These options change no sum, or count by their content.
    left_out = ("check", "uncovered", "optimizer")
    options = {key: value for key, value in to_plain(config).items() if key not in left_out}
    return fingerprint([HASH_VERSION, model_fingerprint, options, rows, *more])


def preconditioner_fingerprint(
    datasets: Sequence[Dataset],
    chosen: Mapping[str, list[int]],
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
) -> str | None:
    """Fingerprint of what the multipliers of gradients come from; None without any.

    K-FAC's factors are of the rows of all datasets.
    """
    if config.normalize == "adam":
        return config.optimizer_hash()
    if config.normalize == "kfac":
        plain = dataclasses.replace(config, normalize=None, damping=None)
        rows = sorted(
            sums_fingerprint(d, chosen[d.name], model_fingerprint, plain, freeze) for d in datasets
        )
        return fingerprint(rows)
    return None


def content_of(dataset: Dataset, indices: Sequence[int]) -> str:
    rows = hashlib.sha256()
    for index in indices:
        example = dataset.examples[index]
        tree = () if example.tree is None else (example.tree.starts, example.tree.parents)
        for array in (example.input_ids, example.labels, *tree):
            rows.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())
    return rows.hexdigest()
