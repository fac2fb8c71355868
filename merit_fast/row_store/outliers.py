"""Rows that agree least with the rest of their own dataset."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from merit_fast.row_store.checkpoints import Checkpoints, Indices, ratio
from merit_fast.row_store.files import StoredDataset
from merit_fast.row_store.hits import Hit
from merit_fast.row_store.target import Weight, block_numbers, block_sums, weights_of

_CHUNK_ROWS = 1024


def find_outliers(checkpoints: Checkpoints, name: str, k: int, weight: Weight) -> list[Hit]:
    """The k rows with the lowest cosines with the mean of their dataset's other rows.

    See ``Rows.outliers``.
    """
    stored = [store[name] for store in checkpoints.stores]
    every = np.arange(len(stored[0]))
    blocks = block_numbers(stored[0].row.numpy())
    sums = [block_sums(dataset, every, blocks, weight)[0] for dataset in stored]

    def cosines(indices: Indices, block: int | None) -> Tensor:
        """Cosines [k] with the other rows' mean, that of the rows outside of ``block``."""
        weights = weights_of(stored[0], weight)[torch.as_tensor(indices)]
        if block is not None:
            weights = weights * torch.as_tensor(blocks[indices] != block)
        total = torch.zeros(len(indices), dtype=torch.float64)
        for dataset, factor, found in zip(stored, checkpoints.weights, sums, strict=True):
            rest = found.sum(0) if block is None else found.sum(0) - found[block]
            total += factor * _cosines_without_own(dataset, rest, weights, indices)
        return total

    filled = np.unique(blocks).tolist()
    scores = {name: -cosines(every, None)}
    chosen = checkpoints.best(scores, k, frozenset())
    hits = checkpoints.hits(
        scores,
        chosen,
        lambda name, indices: torch.stack([-cosines(indices, block) for block in filled], 1),
    )
    return [_negated(hit) for hit in hits]


def _cosines_without_own(
    dataset: StoredDataset, total: Tensor, own: Tensor, indices: Indices
) -> Tensor:
    """Cosines [k] of vectors v with ``total`` - own * v; of a sum that holds own * v."""
    found = []
    for start in range(0, len(indices), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        vectors = dataset.vectors.take(indices[part]).double()
        rest = total - own[part].unsqueeze(1) * vectors
        lengths = vectors.norm(dim=1) * rest.norm(dim=1)
        found.append(ratio((vectors * rest).sum(1), lengths))
    return torch.cat(found)


def _negated(hit: Hit) -> Hit:
    left_out = tuple(-score for score in hit.left_out)
    return replace(hit, score=-hit.score, left_out=left_out)
