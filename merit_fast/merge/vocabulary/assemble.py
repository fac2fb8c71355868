"""Matrices of a model for the output's vocabulary, as boxes of the models' own matrices."""

import math
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import AssembledEntry, Part, TensorEntry, is_plain, value_dtype
from merit_fast.merge.vocabulary.rows import (
    MADE,
    MeanRow,
    PaddingRow,
    RowPlan,
    Run,
    runs_of,
)

_ROWS_FILE = "rows.f64"


@dataclass(frozen=True)
class MadeRow:
    """One made row: the mean over the first dimension of ``source`` [m, n]; zeros for None."""

    offset: int  # bytes in the file
    num_elements: int
    source: TensorEntry | None


@dataclass(frozen=True)
class MadeRows:
    """A file of rows in float64 that no model has. The engine writes it before it reads it.

    ``rows`` are in an order in which each one needs only earlier ones.
    """

    file: Path
    rows: tuple[MadeRow, ...]

    @property
    def num_bytes(self) -> int:
        return sum(8 * row.num_elements for row in self.rows)


class RowFile:
    """Collects the made rows of all matrices."""

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir()) / f"merit-fast-{secrets.token_hex(8)}"
        self.file = folder / _ROWS_FILE
        self.rows: list[MadeRow] = []
        self._end = 0

    def reserve(self, name: str, count: int, rest: tuple[int, ...]) -> TensorEntry:
        """Room for ``count`` rows of one matrix, as an entry [count, *rest]."""
        num_bytes = 8 * count * math.prod(rest)
        entry = TensorEntry(name, "F64", (count, *rest), self.file, self._end, num_bytes)
        self._end += num_bytes
        return entry

    def fill(self, room: TensorEntry, number: int, source: TensorEntry | None) -> None:
        """Says of what one row of the room is the mean."""
        num_elements = math.prod(room.shape[1:])
        offset = room.offset + 8 * number * num_elements
        self.rows.append(MadeRow(offset, num_elements, source))

    def finished(self) -> MadeRows | None:
        """The file's description; None where no row is made."""
        return MadeRows(self.file, tuple(self.rows)) if self.rows else None


def assemble(
    plan: RowPlan, name: str, axis: int, entries: Sequence[TensorEntry], file: RowFile
) -> list[TensorEntry]:
    """One matrix of every model with the output's rows; a matrix that stays is returned as it is.

    Args:
        axis: the dimension that counts tokens.
        entries: [K] the models' own matrices.
        file: receives the rows that are made.
    """
    rest = _without(entries[0].shape, axis)
    room = file.reserve(name, len(plan.made), rest) if plan.made else entries[0]
    sources = _Sources(axis, entries, room)
    every_id = np.arange(plan.models.shape[1])
    paddings = []
    for number, made in enumerate(plan.made):
        if isinstance(made, PaddingRow):
            paddings.append((number, made))
        else:
            file.fill(room, number, sources.stack(made) if made.rows else None)
    for number, padding in paddings:
        tokens = np.flatnonzero(plan.is_token)
        runs = runs_of(plan, padding.model, tokens)
        file.fill(room, number, sources.rows_first(name, runs, len(tokens), padding.model))
    assembled = []
    for k, entry in enumerate(entries):
        if plan.changes(k, entry.shape[axis]):
            entry = sources.joined(name, runs_of(plan, k, every_id), len(every_id), k)
        assembled.append(entry)
    return assembled


class _Sources:
    """Boxes of the models' matrices and of the made rows."""

    def __init__(self, axis: int, entries: Sequence[TensorEntry], room: TensorEntry) -> None:
        self.axis = axis
        self.entries = entries
        self.room = room

    def joined(self, name: str, runs: Sequence[Run], count: int, model: int) -> AssembledEntry:
        """A matrix of ``count`` tokens in the models' own layout."""
        shape = _with(_without(self.entries[model].shape, self.axis), self.axis, count)
        parts = tuple(self._part(run, shape, self.axis) for run in runs)
        return _entry(name, shape, parts)

    def rows_first(self, name: str, runs: Sequence[Run], count: int, model: int) -> AssembledEntry:
        """The same as one row per token: [count, ...]."""
        shape = (count, *_without(self.entries[model].shape, self.axis))
        return _entry(name, shape, tuple(self._part(run, shape, 0) for run in runs))

    def stack(self, mean: MeanRow) -> AssembledEntry:
        """The rows of a mean, one below the other."""
        name = self.entries[0].name
        shape = (len(mean.rows), *_without(self.entries[0].shape, self.axis))
        runs = [Run(i, 1, model, row, 1) for i, (model, row) in enumerate(mean.rows)]
        return _entry(name, shape, tuple(self._part(run, shape, 0) for run in runs))

    def _part(self, run: Run, shape: tuple[int, ...], axis: int) -> Part:
        """The box of a run in a tensor of ``shape``, whose dimension ``axis`` counts tokens."""
        is_made = run.model == MADE
        source = self.room if is_made else self.entries[run.model]
        strides = _strides(source.shape)
        token_axis = 0 if is_made else self.axis
        per_token = strides[token_axis]
        others = strides[:token_axis] + strides[token_axis + 1 :]
        return Part(
            source,
            _with((0,) * len(others), axis, run.first),
            _with(_without(shape, axis), axis, run.count),
            run.row * per_token,
            _with(others, axis, run.step * per_token),
        )


def _entry(name: str, shape: tuple[int, ...], parts: tuple[Part, ...]) -> AssembledEntry:
    first = parts[0].source
    dtypes = {part.source.dtype for part in parts}
    is_uniform = len(dtypes) == 1 and all(is_plain(part.source) for part in parts)
    num_bytes = sum(_bytes_read(part) for part in parts)
    dtype = first.dtype if is_uniform else "F64"
    return AssembledEntry(name, dtype, shape, first.file, first.offset, num_bytes, parts)


def _bytes_read(part: Part) -> int:
    elements = math.prod(
        size for size, stride in zip(part.sizes, part.strides, strict=True) if stride
    )
    return (
        elements
        * ITEM_BYTES[part.source.dtype if is_plain(part.source) else value_dtype(part.source)]
    )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])
