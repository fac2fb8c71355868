"""The examples that stand for a dataset, their blocks, and the fingerprint of what its sums need.

Products of two datasets' block sums are unbiased if the blocks hold different rows. So a row that
two datasets have lies in one block, by its content, and the split takes products of different
blocks only for such datasets.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merit_fast.data import Dataset, Example
from merit_fast.data.shares import draw_rows
from merit_fast.errors import InputError
from merit_fast.kernels.sketch import HASH_VERSION
from merit_fast.manifests.io import fingerprint
from merit_fast.options.parser import to_plain
from merit_fast.sketch.config import SketchConfig

# Options that change no sum beyond rounding.
_NO_SUM = ("check", "uncovered", "batch_size", "store", "store_dim")
_WORD = 4  # bytes of a digest that choose a block
_ENOUGH = 3  # blocks that a dataset fills, so that two are left where one is left out


@dataclass(frozen=True)
class RowBlocks:
    """Blocks of one dataset's chosen rows.

    Attributes:
        blocks: [n] block of each.
        shared: [n] int64 hash of each that another dataset has too; None for the others.
    """

    blocks: list[int]
    shared: list[int | None]

    def shared_rows(self, start: int, stop: int) -> Tensor:
        """[S] int64 hashes of the shared ones among some rows."""
        hashes = [row for row in self.shared[start:stop] if row is not None]
        return torch.tensor(hashes, dtype=torch.int64)

    @property
    def fingerprint(self) -> list[Any]:
        """What a dataset's sums depend on; empty if it shares no row."""
        if all(row is None for row in self.shared):
            return []
        return [{"blocks": self.blocks, "shared": self.shared}]


def row_digests(dataset: Dataset, indices: Sequence[int]) -> list[bytes]:
    """SHA-256 of each example: tokens, labels, shared beginnings and images."""
    digests = []
    for index in indices:
        example = dataset.examples[index]
        digest = hashlib.sha256()
        add_content(digest, example)
        if example.media is not None:
            digest.update(example.media.fingerprint().encode())
        digests.append(digest.digest())
    return digests


def add_content(digest: Any, example: Example) -> None:
    """Adds an example's tokens, labels and shared beginnings to a hash."""
    tree = () if example.tree is None else (example.tree.starts, example.tree.parents)
    for array in (example.input_ids, example.labels, *tree):
        digest.update(len(array).to_bytes(8, "little") + array.astype("<i4").tobytes())


def assign_blocks(digests: Mapping[str, Sequence[bytes]], blocks: int) -> dict[str, RowBlocks]:
    """Gives every chosen row of every dataset its block.

    A row that two or more datasets have goes to block (word k of its digest) mod G, the same in
    all. The other rows fill the emptiest blocks in order, so without shared rows they go to the
    blocks in turn. k is the first of 8 words under which every dataset with enough rows fills three
    blocks; else the one under which the fewest do not.

    Args:
        digests: dataset -> SHA-256 of each chosen row.
        blocks: G.

    Raises:
        InputError: all rows of a dataset are shared, and lie in one block.
    """
    owners = Counter(row for rows in digests.values() for row in set(rows))
    shared = {row for row, count in owners.items() if count > 1}
    tries = []
    for word in range(32 // _WORD):
        plan = {name: _assign(rows, shared, word, blocks) for name, rows in digests.items()}
        narrow = [name for name in plan if _is_narrow(plan[name], digests[name], blocks)]
        tries.append((len(narrow), word, plan))
        if not narrow:
            break
    _, _, best = min(tries, key=lambda attempt: attempt[:2])
    for name, rows in best.items():
        if len(rows.blocks) > 1 and len(set(rows.blocks)) == 1:
            raise InputError(
                f"{name}: must have rows of its own: other datasets have all of the "
                f"{len(set(digests[name]))} different rows that would be sketched, too few for two "
                "blocks; leave it out"
            )
    return best


def _assign(rows: Sequence[bytes], shared: set[bytes], word: int, blocks: int) -> RowBlocks:
    chosen: list[int | None] = [None] * len(rows)
    filled = [0] * blocks
    for i, row in enumerate(rows):
        if row in shared:
            block = int.from_bytes(row[word * _WORD : (word + 1) * _WORD], "little") % blocks
            chosen[i] = block
            filled[block] += 1
    result = []
    for given in chosen:
        block = filled.index(min(filled)) if given is None else given
        filled[block] += given is None
        result.append(block)
    hashes = [
        int.from_bytes(row[:8], "little", signed=True) if row in shared else None for row in rows
    ]
    return RowBlocks(result, hashes)


def _is_narrow(plan: RowBlocks, rows: Sequence[bytes], blocks: int) -> bool:
    return len(set(plan.blocks)) < min(_ENOUGH, blocks, len(set(rows)))


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
    digests: Sequence[bytes],
    blocks: RowBlocks,
    model_fingerprint: str,
    config: SketchConfig,
    freeze: Sequence[str] | None,
) -> str:
    """Fingerprint of everything that a dataset's file of sums depends on.

    Args:
        digests: of the chosen rows, as ``row_digests`` makes them.
        blocks: their blocks; they count where another dataset shares a row.
        model_fingerprint: the model's.
        config: of the sketch stage.
        freeze: parameters that are not sketched.
    """
    more: list[object] = [] if freeze is None else [{"freeze": list(freeze)}]
    more += blocks.fingerprint
    options = {key: value for key, value in to_plain(config).items() if key not in _NO_SUM}
    rows = [digest.hex() for digest in digests]
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
        add_content(rows, dataset.examples[index])
    return rows.hexdigest()
