"""geometry.json: the Gram matrix of the models' deltas from the base, taken in the same pass."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.io import write_manifest
from merit_fast.manifests.kept import record_of_file, write_record
from merit_fast.manifests.schemas.version import SCHEMA_VERSION
from merit_fast.merge.engine.plan import Segment, Shard
from merit_fast.merge.read.remote import Location
from merit_fast.records import record

Array = npt.NDArray[np.float64]
GEOMETRY_FILE = "geometry.json"


@record
class Geometry:
    """geometry.json. K branches, delta_k = theta_k - theta_0, all sums in float64.

    ``contraction`` is |sum_k w_k delta_k|^2 / sum_k w_k |delta_k|^2, w the shares of the
    coefficients: 1 where branches agree, 1/K for unrelated ones of equal share. It and
    ``displacement`` are null for methods that thin the deltas: those are no weighted sums of whole
    tensors.
    """

    branches: tuple[str, ...]
    gram: tuple[tuple[float, ...], ...]  # [K, K] <delta_i, delta_j>
    norms: tuple[float, ...]  # [K] |delta_k|
    cosines: tuple[tuple[float, ...], ...]  # [K, K]; 0 with a branch that did not move
    displacement: float | None  # |merged - theta_0| before rounding
    contraction: float | None
    tensors: dict[str, tuple[tuple[float, ...], ...]]  # name -> its [K, K] part of gram
    schema_version: int = SCHEMA_VERSION


def cut_pieces(segments: Sequence[Segment], chunk_elements: int) -> npt.NDArray[np.int64]:
    """[P, 3] (segment, first element, elements): segments cut at borders of tensors and chunks."""
    pieces = []
    for number, segment in enumerate(segments):
        borders = sorted({0, *segment.ends, *range(0, segment.num_elements, chunk_elements)})
        pieces += [
            (number, first, end - first) for first, end in zip(borders, borders[1:], strict=False)
        ]
    return np.array(pieces, np.int64).reshape(-1, 3)


def gram_by_tensor(
    segments: Sequence[Segment], pieces: npt.NDArray[np.int64], grams: Array
) -> dict[str, Array]:
    """Sums the pieces' [P, K, K] upper triangles in order, tensor by tensor; symmetric."""
    tensors: dict[str, Array] = {}
    for (number, first, _), gram in zip(pieces, grams, strict=True):
        name = segments[number].name_at(int(first))
        whole = np.triu(gram) + np.triu(gram, 1).T
        tensors[name] = tensors[name] + whole if name in tensors else whole
    return tensors


def write_shard_grams(directory: Path, shard: Shard, tensors: dict[str, Array]) -> None:
    """Keeps a finished shard's matrices, in case the run is interrupted before the last shard."""
    write_text(
        gram_file(directory, shard),
        json.dumps({name: gram.tolist() for name, gram in tensors.items()}),
    )


def write_geometry(directory: Path, shards: Sequence[Shard], branches: Sequence[Location]) -> None:
    """Joins the shards' matrices into geometry.json and removes their files.

    Keeps a geometry.json whose files a killed run had begun to remove.
    """
    files = [gram_file(directory, shard) for shard in shards]
    if (directory / GEOMETRY_FILE).exists() and not all(file.exists() for file in files):
        _remove(files)
        return
    tensors: dict[str, Array] = {}
    for file in files:
        tensors |= {name: np.array(gram) for name, gram in json.loads(file.read_text()).items()}
    count = len(branches)
    gram = sum((tensors[name] for name in sorted(tensors)), np.zeros((count, count)))
    norms = np.sqrt(np.diag(gram))
    lengths = np.where(norms > 0, norms, 1.0)
    displacement, contraction = _movement(shards, tensors, count)
    geometry = Geometry(
        branches=tuple(path.name for path in branches),
        gram=_rows(gram),
        norms=tuple(float(norm) for norm in norms),
        cosines=_rows(gram / np.outer(lengths, lengths)),
        displacement=displacement,
        contraction=contraction,
        tensors={name: _rows(tensors[name]) for name in sorted(tensors)},
    )
    write_manifest(geometry, directory / GEOMETRY_FILE)
    write_record(directory / GEOMETRY_FILE, directory / GEOMETRY_FILE)
    _remove(files)


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)
        record_of_file(file).unlink(missing_ok=True)


def _movement(
    shards: Sequence[Shard], tensors: dict[str, Array], count: int
) -> tuple[float | None, float | None]:
    """(displacement, contraction) of the whole model; coefficients may differ between tensors."""
    coefficients: dict[str, Array] = {}
    for shard in shards:
        for segment in shard.segments:
            if not isinstance(segment.rule, tuple):
                return None, None
            coefficients |= dict.fromkeys(segment.names, np.array(segment.rule[:count]))
    moved = mean_squared = spread = 0.0
    for name in sorted(tensors):
        c = coefficients[name]
        gram = tensors[name]
        shares = np.abs(c) / np.abs(c).sum() if c.any() else np.zeros(count)
        moved += float(c @ gram @ c)
        mean_squared += float(shares @ gram @ shares)
        spread += float(shares @ np.diag(gram))
    return max(moved, 0.0) ** 0.5, mean_squared / spread if spread > 0 else 1.0


def gram_file(directory: Path, shard: Shard) -> Path:
    """The file that keeps a finished shard's matrices until all shards are finished."""
    return directory / f"{shard.file}.gram.json"


def _rows(matrix: Array) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in matrix)
