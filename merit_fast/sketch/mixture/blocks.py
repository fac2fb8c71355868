"""Blocks of the rows that stand for each dataset.

Products of two datasets' block sums are unbiased if the blocks hold different rows. So a row that
two datasets have lies in one block, by its content, and the split takes products of different
blocks only for such datasets.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from merit_fast.data import Dataset, Example
from merit_fast.errors import InputError

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
