"""Pairs of rows with nearly the same gradient: all pairs are screened, the near ones computed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from merit_fast.errors import InputError
from merit_fast.row_store.files import StoredDataset

_WIDTH = 512
_BLOCK_ROWS = 4096
_CHUNK_ROWS = 1024  # at full width
_CHUNK_PAIRS = 1024
_SURE = 6.0  # standard deviations of a projected cosine
_ROUNDING = 2e-4  # of a projected cosine


@dataclass(frozen=True)
class Pair:
    """Two rows, as dataset and number of the row in its file, and their gradients' cosine.

    Of two rows with several examples there is a pair for each two of these.
    """

    a: tuple[str, int]
    b: tuple[str, int]
    cosine: float


def find_pairs(datasets: Sequence[StoredDataset], above: float, most: int) -> list[Pair]:
    """Finds all pairs of rows whose cosine is at least ``above``; see ``Rows.duplicates``."""
    projected = [_project(dataset) for dataset in datasets]
    short = torch.cat([rows for rows, _ in projected])
    owners = np.repeat(np.arange(len(datasets)), [len(rows) for rows, _ in projected])
    indices = np.concatenate([kept for _, kept in projected])
    # A projection to w numbers keeps a cosine c up to (1 - c^2) / sqrt(w).
    screen = above - _SURE * (1 - above**2) / math.sqrt(_WIDTH) - _ROUNDING
    pairs: list[Pair] = []
    for first, second in _screened(short, screen):
        for start in range(0, len(first), _CHUNK_PAIRS):
            left = first[start : start + _CHUNK_PAIRS]
            right = second[start : start + _CHUNK_PAIRS]
            units = [_units(datasets, owners[side], indices[side]) for side in (left, right)]
            cosines = (units[0] * units[1]).sum(1).clamp(-1, 1)
            for number in (cosines >= min(above, 1 - 1e-6)).nonzero()[:, 0].tolist():
                places = sorted(
                    (int(owners[side[number]]), _row(datasets, owners, indices, side[number]))
                    for side in (left, right)
                )
                if places[0] != places[1]:  # else two examples of one row
                    a, b = ((datasets[owner].name, row) for owner, row in places)
                    pairs.append(Pair(a, b, float(cosines[number])))
            if len(pairs) > most:
                raise InputError(
                    f"duplicates: must be at most {most:,} pairs, found more; raise above={above:g}"
                )
    return sorted(pairs, key=lambda pair: (-pair.cosine, pair.a, pair.b))


def _project(dataset: StoredDataset) -> tuple[Tensor, NDArray[np.int64]]:
    """Directions of the rows other than 0, projected: [n, 512] float16; and their positions."""
    generator = torch.Generator().manual_seed(0)
    width = dataset.identity.store_dim
    matrix = torch.randn(width, _WIDTH, generator=generator)
    kept = np.flatnonzero(dataset.norm.numpy() > 0)
    out = torch.empty(len(kept), _WIDTH, dtype=torch.float16)
    for start in range(0, len(kept), _CHUNK_ROWS):
        part = slice(start, start + _CHUNK_ROWS)
        short = dataset.vectors.directions(kept[part]) @ matrix
        out[part] = (short / short.norm(dim=1, keepdim=True)).half()
    return out, kept


def _screened(
    short: Tensor, screen: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of positions i < j whose projected cosine is at least ``screen``, block by block."""
    for top in range(0, len(short), _BLOCK_ROWS):
        rows = short[top : top + _BLOCK_ROWS].float()
        for left in range(top, len(short), _BLOCK_ROWS):
            cosines = rows @ short[left : left + _BLOCK_ROWS].float().T
            found = (cosines >= screen).nonzero().numpy()
            first = found[:, 0] + top
            second = found[:, 1] + left
            rising = first < second
            yield first[rising], second[rising]


def _units(
    datasets: Sequence[StoredDataset], owners: NDArray[np.int64], indices: NDArray[np.int64]
) -> Tensor:
    """Directions [k, D'] float64 of rows of several datasets."""
    width = datasets[0].identity.store_dim
    out = torch.empty(len(owners), width, dtype=torch.float64)
    for owner in np.unique(owners):
        places = np.flatnonzero(owners == owner)
        vectors = datasets[owner].vectors.directions(indices[places]).double()
        out[torch.as_tensor(places)] = vectors / vectors.norm(dim=1, keepdim=True)
    return out


def _row(
    datasets: Sequence[StoredDataset],
    owners: NDArray[np.int64],
    indices: NDArray[np.int64],
    position: int,
) -> int:
    return int(datasets[owners[position]].row[indices[position]])
