"""The examples that stand for each dataset, and the fingerprints of what its outputs depend on."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merit_fast.data import Dataset
from merit_fast.data.shares import draw_rows
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import fingerprint
from merit_fast.options.parser import to_plain
from merit_fast.sketch.config import SketchConfig
from merit_fast.sketch.mixture.blocks import RowBlocks, add_content, assign_blocks, row_digests

# Options that change no sum beyond rounding, or count by their content.
_NO_SUM = ("check", "uncovered", "batch_size", "store", "store_dim", "optimizer", "memory", "span")


@dataclass(frozen=True)
class DrawnDataset:
    """A dataset and the examples that stand for it.

    Attributes:
        indices: [n] the examples, in the order in which they are sketched.
        blocks: of these examples.
        sums: fingerprint of everything that the dataset's sums depend on.
        stored: the same of its stored rows.
        num_spans: runs of examples whose sums are added up in order; 1: nothing is cut.
        span: examples of every span but the last.
    """

    dataset: Dataset
    indices: list[int]
    blocks: RowBlocks
    sums: str
    stored: str
    num_spans: int = 1
    span: int = 0

    @property
    def name(self) -> str:
        return self.dataset.name

    def of_span(self, number: int) -> "DrawnDataset":
        """One span's examples, as a dataset of the same name."""
        start = number * self.span
        stop = start + self.span
        blocks = RowBlocks(self.blocks.blocks[start:stop], self.blocks.shared[start:stop])
        sums = fingerprint([self.sums, number])
        stored = fingerprint([self.stored, number])
        return DrawnDataset(self.dataset, self.indices[start:stop], blocks, sums, stored)


@dataclass(frozen=True)
class DrawnMixture:
    """All datasets of a mixture.

    Attributes:
        multipliers: fingerprint of what gradients are multiplied by; None: by nothing.
    """

    datasets: tuple[DrawnDataset, ...]
    multipliers: str | None

    @property
    def most_examples(self) -> int:
        """Number of examples of the largest draw."""
        return max(len(drawn.indices) for drawn in self.datasets)

    def only(self, name: str) -> "DrawnMixture":
        """The mixture with one dataset, whose blocks stay those of the whole mixture."""
        drawn = tuple(drawn for drawn in self.datasets if drawn.name == name)
        return dataclasses.replace(self, datasets=drawn)


def draw_mixture(
    datasets: Sequence[Dataset],
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
    factors: Path | None = None,
) -> DrawnMixture:
    """Draws the examples of every dataset and gives them their blocks.

    Args:
        datasets: the mixture.
        model_fingerprint: the model's.
        config: of the sketch stage.
        freeze: parameters that are not sketched.
        factors: file of the K-FAC factors, if they are not of these datasets.

    Raises:
        InputError: a dataset of one example, or of too few rows that no other dataset has; an
            optimizer's state that is absent.
    """
    chosen = {dataset.name: choose_examples(dataset, config) for dataset in datasets}
    digests = {dataset.name: row_digests(dataset, chosen[dataset.name]) for dataset in datasets}
    blocks = assign_blocks(digests, config.blocks)
    common = {"hash": HASH_VERSION, "model": model_fingerprint, "freeze": freeze}
    contents = {
        name: [common, [digest.hex() for digest in rows], blocks[name].fingerprint]
        for name, rows in digests.items()
    }
    multipliers = _multipliers_fingerprint(contents, config, factors)
    drawn = []
    for dataset in datasets:
        indices = chosen[dataset.name]
        num_spans = config.num_spans(len(indices))
        cut = [config.span] if num_spans > 1 else []
        sums = fingerprint([contents[dataset.name], _options_of_sums(config), multipliers, *cut])
        numbers = dataset.source_rows[indices].tolist()
        places = places_in_rows(dataset)[indices].tolist()
        stored = fingerprint([sums, config.store_dim, numbers, places])
        spans = (num_spans, config.span)
        drawn.append(DrawnDataset(dataset, indices, blocks[dataset.name], sums, stored, *spans))
    return DrawnMixture(tuple(drawn), multipliers)


def _options_of_sums(config: SketchConfig) -> dict[str, Any]:
    return {key: value for key, value in to_plain(config).items() if key not in _NO_SUM}


def _multipliers_fingerprint(
    contents: Mapping[str, Any], config: SketchConfig, factors: Path | None
) -> str | None:
    """Fingerprint of what gradients are multiplied by; None: by nothing."""
    if config.normalize == "adam":
        return config.optimizer_hash()
    if config.normalize != "kfac":
        return None
    if factors is not None:
        return checksum(factors)
    options = _options_of_sums(dataclasses.replace(config, normalize=None, damping=None))
    # The factors are of the rows of all datasets, in any order.
    return fingerprint(sorted(fingerprint([content, options]) for content in contents.values()))


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
        add_content(rows, dataset.examples[index])
    return rows.hexdigest()
