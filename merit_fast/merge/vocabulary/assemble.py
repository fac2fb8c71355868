"""Matrices of a model for the output's vocabulary, as boxes of the models' own matrices."""

import math
import secrets
import tempfile
from collections.abc import Sequence
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
from merit_fast.records import record

_ROWS_FILE = "rows.f64"


@record
class MadeRow:
    """One made row: the mean over the first dimension of ``source`` [m, n]; zeros for None."""

    offset: int  # bytes in the file
    num_elements: int
    source: TensorEntry | None


@record
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
    paddings = []
    for number, made in enumerate(plan.made):
        if isinstance(made, PaddingRow):
            paddings.append((number, made))
        else:
            file.fill(room, number, sources.stack(made) if made.rows else None)
    for number, padding in paddings:  # they need the rows above
        tokens = np.flatnonzero(plan.is_token)
        runs = runs_of(plan, padding.model, tokens)
        file.fill(room, number, sources.rows_first(runs, len(tokens)))
    count = plan.models.shape[1]
    return [
        sources.joined(plan.runs(k), count) if plan.changes(k, entry.shape[axis]) else entry
        for k, entry in enumerate(entries)
    ]


class _Source:
    """A matrix from which boxes are taken, with what each of them needs."""

    def __init__(self, entry: TensorEntry, axis: int) -> None:
        strides = _strides(entry.shape)
        self.entry = entry
        self.per_token = strides[axis]
        self.others = strides[:axis] + strides[axis + 1 :]
        item = ITEM_BYTES[entry.dtype if is_plain(entry) else value_dtype(entry)]
        self.row_bytes = math.prod(_without(entry.shape, axis)) * item


class _Sources:
    """Boxes of the models' matrices and of the made rows."""

    def __init__(self, axis: int, entries: Sequence[TensorEntry], room: TensorEntry) -> None:
        self.axis = axis
        self.rest = _without(entries[0].shape, axis)
        self.name = entries[0].name
        self.models = [_Source(entry, axis) for entry in entries]
        self.made = _Source(room, 0)

    def joined(self, runs: Sequence[Run], count: int) -> AssembledEntry:
        """A matrix of ``count`` tokens in the models' own layout."""
        return self._assembled(runs, count, self.axis)

    def rows_first(self, runs: Sequence[Run], count: int) -> AssembledEntry:
        """The same as one row per token: [count, ...]."""
        return self._assembled(runs, count, 0)

    def stack(self, mean: MeanRow) -> AssembledEntry:
        """The rows of a mean, one below the other."""
        runs = [Run(i, 1, model, row, 1) for i, (model, row) in enumerate(mean.rows)]
        return self._assembled(runs, len(runs), 0)

    def _assembled(self, runs: Sequence[Run], count: int, axis: int) -> AssembledEntry:
        """The runs' boxes in a tensor whose dimension ``axis`` counts tokens."""
        used = {run.model for run in runs}
        sources = {model: self.made if model == MADE else self.models[model] for model in used}
        zeros = (0,) * len(self.rest)
        parts = []
        num_bytes = 0
        for run in runs:
            source = sources[run.model]
            offsets = _with(zeros, axis, run.first)
            sizes = _with(self.rest, axis, run.count)
            strides = _with(source.others, axis, run.step * source.per_token)
            start = run.row * source.per_token
            parts.append(Part(source.entry, offsets, sizes, start, strides))
            num_bytes += source.row_bytes * (run.count if run.step else 1)
        entries = [source.entry for source in sources.values()]
        is_uniform = len({entry.dtype for entry in entries}) == 1 and all(map(is_plain, entries))
        first = parts[0].source
        return AssembledEntry(
            self.name,
            first.dtype if is_uniform else "F64",
            _with(self.rest, axis, count),
            first.file,
            first.offset,
            num_bytes,
            tuple(parts),
        )


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides in elements."""
    return tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1 :]


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis:])
