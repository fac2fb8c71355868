"""An adapter extracted from a full fine-tune: the SVD of each tensor's change.

tuned - base ≈ B A, B [out, r], A [r, in], by the largest singular values
"""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from merit_fast.errors import InputError
from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.manifests.directories import output_directory
from merit_fast.manifests.io import stage_manifest
from merit_fast.merge.engine.layout import StoredTensor
from merit_fast.merge.engine.opened import OpenFiles, open_files
from merit_fast.merge.engine.values import values
from merit_fast.merge.lora.blocks import Difference
from merit_fast.merge.lora.files import Array, rank_keys, spool_weights, write_config
from merit_fast.merge.lora.keys import extracted_config, factor_keys, rank_name, whole_keys
from merit_fast.merge.lora.models import Pair, read_pair
from merit_fast.merge.lora.products import Form, stored_factors
from merit_fast.merge.lora.singular import Cut, cut_energy, cut_matrix
from merit_fast.merge.lora.targets import Target, targets_of
from merit_fast.merge.read.entries import TensorEntry, stored_entries
from merit_fast.merge.read.remote import Location
from merit_fast.merge.write.fingerprints import input_fingerprints
from merit_fast.merge.write.places import check_paths
from merit_fast.options.fields import require
from merit_fast.progress import Progress
from merit_fast.records import record

_DTYPE = "F32"
_RUN = 1 << 20  # elements of a whole tensor that are copied at a time


@record
class ExtractConfig:
    """Options of ``extract_lora``: a rank, or the share of each squared norm to keep."""

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        has_one = (self.rank is None) != (self.energy is None)
        require(has_one, "rank", "given, or energy, and not both", self.rank)
        require(self.rank is None or self.rank >= 1, "rank", "at least 1", self.rank)
        in_range = self.energy is None or 0.0 < self.energy <= 1.0
        require(in_range, "energy", "above 0 and at most 1", self.energy)


def extract_lora(
    base: Location, model: Location, out: Path, config: ExtractConfig, progress: Progress
) -> dict[str, Any]:
    """Writes the adapter that turns ``base`` into ``model``, up to the error that it returns.

    Matrices of layers and experts become factors in float32; changed embeddings, heads and norms
    become ``modules_to_save``. Memory: 4 (out + in) (rank + 10) float64 of the largest matrix, or
    with an energy 3 min(out, in)^2.

    Args:
        base: the model from which the fine-tune started.
        model: the fine-tune.
        out: absent, or an earlier output, which is replaced.
        config: rank or energy.
        progress: receives progress.

    Returns:
        JSON-ready: relative errors in the Frobenius norm in total and by kind, ranks, names of
        changed tensors that no form of an adapter holds.

    Raises:
        InputError: ``out`` is an input or not ours; tensors do not match, a value is not finite,
            nothing changed in a matrix of a layer.
    """
    check_paths([base, model], out)
    pair = read_pair(base, model)
    files = {
        stored.file
        for entries in pair.tensors.values()
        for entry in entries
        for stored in stored_entries(entry)
    }
    inputs = input_fingerprints([base, model], files)
    manifest = stage_manifest("extract-lora", config, inputs)
    with open_files(files, None) as opened:
        changed = _changed(pair, opened, progress)
        entries = {name: pair.tensors[name][0] for name in changed}
        targets = targets_of(entries, pair.base_tensors, pair.model_type)
        if not any(target.kind in ("matrix", "parameter") for target in targets):
            raise InputError(f"{model}: has no matrix of a layer that differs from {base}")
        work = _Extraction(pair, targets, changed, config, opened)
        with output_directory(out, manifest) as directory:
            parameters = spool_weights(directory, work.written(progress))
            write_config(directory, work.config(str(base)))
    return work.summary(out, base, model) | {"parameters": parameters}


class _Extraction:
    """The tensors of one adapter, made in order; errors and ranks are known when all are made."""

    def __init__(
        self,
        pair: Pair,
        targets: list[Target],
        changed: Mapping[str, float],
        config: ExtractConfig,
        files: OpenFiles,
    ) -> None:
        self.pair = pair
        self.targets = targets
        self.changed = changed
        self.options = config
        self.files = files
        self.lost = {t.name: changed[t.name] for t in targets if t.kind == "left out"}
        self.ranks: dict[str, int] = {}

    def written(self, progress: Progress) -> Iterator[tuple[StoredTensor, Iterable[Array]]]:
        keys = factor_keys(self.targets)
        with progress.task("extract", len(self.targets), "tensors") as task:
            for target in self.targets:
                if target.name in keys:
                    for key, array in zip(keys[target.name], self._factors(target), strict=True):
                        yield StoredTensor(key, _DTYPE, array.shape), [array]
                task.advance(1)
        tuned = self.pair.tuned_tensors
        for key, name in whole_keys(self.targets, tuned, self._tied()).items():
            entry = tuned[name]
            dtype = entry.dtype if entry.dtype in FLOAT_DTYPES else _DTYPE
            yield StoredTensor(key, dtype, entry.shape), self._runs(entry)

    def _runs(self, entry: TensorEntry) -> Iterator[Array]:
        for at in range(0, entry.num_elements, _RUN):
            count = min(_RUN, entry.num_elements - at)
            yield to_float64(*values(entry, at, count, self.files))

    def config(self, base: str) -> dict[str, Any]:
        ranks = {
            rank_name(target): (self.ranks[target.name], 1.0)
            for target in self.targets
            if target.name in self.ranks
        }
        ties = self._tied() is not None
        tensors = self.pair.base_tensors
        settings = extracted_config(self.targets, tensors, self.pair.config, base, ties)
        return settings | rank_keys(ranks)

    def summary(self, out: Path, base: Location, model: Location) -> dict[str, Any]:
        kinds = sorted({target.kind for target in self.targets})
        errors = {kind: self._error([t for t in self.targets if t.kind == kind]) for kind in kinds}
        ranks = list(self.ranks.values())
        return {
            "extracted": str(out),
            "base": str(base),
            "model": str(model),
            "rank": [min(ranks), max(ranks)],
            "tensors": {kind: sum(t.kind == kind for t in self.targets) for kind in kinds},
            "unchanged": len(self.pair.tensors) - len(self.targets),
            "error": self._error(self.targets),
            "errors": errors,
            "left_out": [target.name for target in self.targets if target.kind == "left out"],
        }

    def _error(self, targets: list[Target]) -> float:
        """The relative error in the Frobenius norm of these tensors' changes."""
        total = sum(self.changed[target.name] for target in targets)
        lost = sum(self.lost.get(target.name, 0.0) for target in targets)
        return math.sqrt(lost / total) if total else 0.0

    def _tied(self) -> tuple[str, str] | None:
        """(embedding, head) where the embedding is saved and is the head too."""
        saved = {target.name for target in self.targets if target.kind == "whole"}
        embedding = self.pair.embedding
        head = self.pair.tied_head
        return (embedding, head) if embedding in saved and embedding and head else None

    def _factors(self, target: Target) -> list[Array]:
        before, after = self.pair.tensors[target.name]
        shape = before.shape
        count = shape[0] if len(shape) == 3 else 1
        rows, cols = shape[-2:]
        matrices = [
            Difference(before, after, (rows, cols), e * rows * cols, self.files)
            for e in range(count)
        ]
        cuts = self._cuts(target, matrices)
        self.lost[target.name] = sum(cut.lost for cut in cuts)
        self.ranks[target.name] = cuts[0].left.shape[1]
        left = np.stack([cut.left for cut in cuts])
        right = np.stack([cut.right for cut in cuts])
        if target.transposed:
            left, right = right.swapaxes(1, 2), left.swapaxes(1, 2)
        form = Form("", "", count, left.shape[1], (right.shape[2],))
        return stored_factors(left, right, form)

    def _cuts(self, target: Target, matrices: list[Difference]) -> list[Cut]:
        """A cut of each matrix, all of one rank."""
        if self.options.rank is not None:
            rank = min(self.options.rank, *matrices[0].shape)
            seed = zlib.crc32(target.name.encode())
            return [cut_matrix(matrix, rank, seed) for matrix in matrices]
        assert self.options.energy is not None
        energy = self.options.energy
        cuts = [cut_energy(matrix, energy) for matrix in matrices]
        most = max(cut.left.shape[1] for cut in cuts)
        return [
            cut if cut.left.shape[1] == most else cut_energy(matrix, energy, most)
            for cut, matrix in zip(cuts, matrices, strict=True)
        ]


def _changed(pair: Pair, files: OpenFiles, progress: Progress) -> dict[str, float]:
    """The squared norms of the changes by tensor, without tensors that are equal."""
    changed = {}
    with progress.task("compare", len(pair.tensors), "tensors") as task:
        for name, (before, after) in pair.tensors.items():
            if square := _squared_change(name, before, after, files):
                changed[name] = square
            task.advance(1)
    return changed


def _squared_change(name: str, before: TensorEntry, after: TensorEntry, files: OpenFiles) -> float:
    """The squared Frobenius norm of a tensor's change; 0 for equal tensors.

    Raises:
        InputError: it is not finite.
    """
    elements = before.num_elements
    square = Difference(before, after, (elements, 1), 0, files).square() if elements else 0.0
    if not math.isfinite(square):
        raise InputError(f"{after.file}: {name}: must be finite here and in {before.file}")
    return square
