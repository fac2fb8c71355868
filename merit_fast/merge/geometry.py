"""What a merge's branches look like from their base: the Gram matrix of their deltas, taken in the same pass."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merit_fast.manifest import SCHEMA_VERSION, write_manifest, write_text
from merit_fast.merge.plan import Segment, Shard

Array = npt.NDArray[np.float64]
GEOMETRY_FILE = "geometry.json"


@dataclass(frozen=True)
class Geometry:
    """geometry.json. K branches, delta_k = theta_k - theta_0, all sums in float64.

    ``contraction`` is |sum_k w_k delta_k|^2 / sum_k w_k |delta_k|^2, w the shares of the coefficients: 1 where branches
    agree, 1/K for unrelated ones of equal share.
    """

    branches: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]  # [K, K] <delta_i, delta_j>
    norms: tuple[float, ...]  # [K] |delta_k|
    cosines: tuple[tuple[float, ...], ...]  # [K, K]; 0 with a branch that did not move
    displacement: float  # |merged - theta_0| before rounding
    contraction: float
    tensors: dict[str, tuple[tuple[float, ...], ...]]  # name -> its [K, K] part of gram
    schema_version: int = SCHEMA_VERSION


def cut_pieces(segments: Sequence[Segment], chunk_elements: int) -> npt.NDArray[np.int64]:
    """[P, 3] (segment, first element, elements): the segments cut at tensors' and chunks' borders, in order."""
    pieces = []
    for number, segment in enumerate(segments):
        borders = sorted({0, *segment.ends, *range(0, segment.num_elements, chunk_elements)})
        pieces += [(number, first, end - first) for first, end in zip(borders, borders[1:], strict=False)]
    return np.array(pieces, np.int64).reshape(-1, 3)


def gram_by_tensor(segments: Sequence[Segment], pieces: npt.NDArray[np.int64], grams: Array) -> dict[str, Array]:
    """Sums the pieces' [P, K, K] upper triangles in order, tensor by tensor; symmetric."""
    tensors: dict[str, Array] = {}
    for (number, first, _), gram in zip(pieces, grams, strict=True):
        name = segments[number].name_at(int(first))
        whole = np.triu(gram) + np.triu(gram, 1).T
        tensors[name] = tensors[name] + whole if name in tensors else whole
    return tensors


def write_shard_grams(directory: Path, shard: Shard, tensors: dict[str, Array]) -> None:
    """Keeps a finished shard's part for a run that is interrupted before the last one."""
    write_text(_part(directory, shard), json.dumps({name: gram.tolist() for name, gram in tensors.items()}))


def write_geometry(
    directory: Path, shards: Sequence[Shard], branches: Sequence[Path], coefficients: Sequence[float]
) -> None:
    """Joins the shards' parts into geometry.json and removes them. ``coefficients`` are those of the branches."""
    tensors: dict[str, Array] = {}
    for shard in shards:
        part = json.loads(_part(directory, shard).read_text())
        tensors |= {name: np.array(gram) for name, gram in part.items()}
    count = len(branches)
    gram = sum((tensors[name] for name in sorted(tensors)), np.zeros((count, count)))
    norms = np.sqrt(np.diag(gram))
    lengths = np.where(norms > 0, norms, 1.0)
    c = np.array(coefficients)
    shares = np.abs(c) / np.abs(c).sum() if c.any() else np.zeros(count)
    mean_squared, spread = float(shares @ gram @ shares), float(shares @ np.diag(gram))
    geometry = Geometry(
        branches=tuple(path.name for path in branches),
        gram=_rows(gram),
        norms=tuple(float(norm) for norm in norms),
        cosines=_rows(gram / np.outer(lengths, lengths)),
        displacement=max(float(c @ gram @ c), 0.0) ** 0.5,
        contraction=mean_squared / spread if spread > 0 else 1.0,
        tensors={name: _rows(tensors[name]) for name in sorted(tensors)},
    )
    write_manifest(geometry, directory / GEOMETRY_FILE)
    for shard in shards:
        _part(directory, shard).unlink()


def _part(directory: Path, shard: Shard) -> Path:
    return directory / f"{shard.file}.gram.json"


def _rows(matrix: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)
