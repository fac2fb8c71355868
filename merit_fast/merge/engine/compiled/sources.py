"""Entries as sources of merit_fast._C, form by form; ``values`` gives the same numbers in NumPy."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from merit_fast.errors import MeritFastError
from merit_fast.kernels.average.dtypes import FLOAT_DTYPES, ITEM_BYTES
from merit_fast.kernels.lazy import np
from merit_fast.merge.engine.changes import columns_of, factors_of, length_factors
from merit_fast.merge.engine.decode import code_bits, code_values
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.read.entries import (
    AssembledEntry,
    Change,
    ChangedEntry,
    DecodedEntry,
    Grid,
    Magnitude,
    Part,
    Rows,
    TensorEntry,
    value_dtype,
)

if TYPE_CHECKING:
    import numpy.typing as npt

CODES = {dtype: code for dtype, (code, _) in FLOAT_DTYPES.items()}
_WIDE_CHUNKS = 16  # chunks of a transposed tensor that are read at once, and shared by workers


def held_bytes(entry: TensorEntry) -> int:
    """Memory of the small arrays that an entry's source holds while it exists."""
    if isinstance(entry, ChangedEntry):
        assert entry.source is not None
        stored = [small for change in entry.changes for small in change.stored]
        return 8 * sum(small.num_elements for small in stored) + held_bytes(entry.source)
    if isinstance(entry, AssembledEntry):
        sources = {id(part.source): part.source for part in entry.parts}
        return 100 * len(entry.parts) + sum(map(held_bytes, sources.values()))
    if isinstance(entry, DecodedEntry):
        return sum(grid.columns.num_bytes for grid in entry.grids if grid.columns is not None)
    return 0


def scratch_bytes(entry: TensorEntry) -> int:
    """Bytes per element of a chunk in which an entry's source works while it reads."""
    if isinstance(entry, ChangedEntry):
        assert entry.source is not None
        rows = [change.rows for change in entry.changes if isinstance(change, Rows)]
        return max(_double_scratch(each) for each in (entry.source, *rows))
    if isinstance(entry, AssembledEntry):
        own = value_dtype(entry)
        sources = {id(part.source): part.source for part in entry.parts}.values()
        each = [
            scratch_bytes(source) if value_dtype(source) == own else _double_scratch(source)
            for source in sources
        ]
        return ITEM_BYTES[own] + max(each, default=0)
    return 1 if isinstance(entry, DecodedEntry) else 0


def wide_bytes(entry: TensorEntry) -> int:
    """Bytes per element of a chunk of the runs that are kept of a transposed tensor; 0 without."""
    if isinstance(entry, ChangedEntry):
        assert entry.source is not None
        return wide_bytes(entry.source)
    if not isinstance(entry, AssembledEntry):
        return 0
    sources = {id(part.source): part.source for part in entry.parts}
    inside = sum(map(wide_bytes, sources.values()))
    is_turned = any(abs(_inner_stride(part)) > 1 for part in entry.parts)
    return inside + is_turned * _WIDE_CHUNKS * ITEM_BYTES[value_dtype(entry)]


def _inner_stride(part: Part) -> int:
    """How far neighbours in the last dimension lie apart in a part's source."""
    steps = zip(part.sizes, part.strides, strict=True)
    strides = [stride for size, stride in steps if size > 1]
    return strides[-1] if strides else 1


def _double_scratch(entry: TensorEntry) -> int:
    dtype = value_dtype(entry)
    return scratch_bytes(entry) + (0 if dtype == "F64" else ITEM_BYTES[dtype])


class SourceBuilder:
    """Builds sources, one for each entry; keeps the small arrays to which they point."""

    def __init__(self, native: Any, files: OpenFiles, step: int = 0) -> None:
        """``step``: elements of a chunk; without it transposed tensors are read chunk by chunk."""
        self.native = native
        self.files = files
        self.step = step
        self._kept: list[npt.NDArray[Any]] = []

    def source(self, entry: TensorEntry) -> Any:
        """The source of an entry of any form."""
        if isinstance(entry, ChangedEntry):
            return self._changed(entry)
        if isinstance(entry, AssembledEntry):
            return self._assembled(entry)
        if isinstance(entry, DecodedEntry):
            return self._decoded(entry)
        return self.native.PlainSource(
            file=self.files.number(entry.file), offset=entry.offset, stored=CODES[entry.dtype]
        )

    def _assembled(self, entry: AssembledEntry) -> Any:
        table, sources = box_table(entry)
        return self.native.BoxesSource(
            sources=[self.source(source) for source in sources],
            table=table,
            shape=list(entry.shape),
            type=CODES[value_dtype(entry)],
            wide=_WIDE_CHUNKS * self.step,
        )

    def _changed(self, entry: ChangedEntry) -> Any:
        assert entry.source is not None
        source = self.source(entry.source)
        changes: list[Any] = []
        for change in entry.changes:
            changes.append(self._change(change, entry, source, changes))
        return self.native.ChangedSource(source=source, changes=changes)

    def _change(self, change: Change, entry: TensorEntry, source: Any, earlier: list[Any]) -> Any:
        """A change of an entry. ``earlier``: the changes of ``source`` that come before it."""
        cols = columns_of(entry)
        if isinstance(change, Rows):
            order = np.argsort(change.indices, kind="stable")
            return self.native.ReplacedRows(
                source=self.source(change.rows),
                rows=[change.indices[i] for i in order],
                source_rows=order.tolist(),
                cols=cols,
            )
        if isinstance(change, Magnitude):
            before = self.native.ChangedSource(source=source, changes=earlier)
            factors = length_factors(change, entry, self.files, self._reader(before))
            return self.native.ScaledVectors(
                factors=factors.ctypes.data, cols=cols, by_column=change.by_column
            )
        left, right = factors_of(change, self.files)
        self._kept += [left, right]
        return self.native.LowRank(
            left=left.ctypes.data,
            right=right.ctypes.data,
            rank=left.shape[1],
            cols=right.shape[2],
            block_rows=max(left.shape[0] // right.shape[0], 1),
            factor=change.scaling,
        )

    def _reader(self, source: Any) -> Callable[[int, int], npt.NDArray[np.float64]]:
        """A function that gives any elements of a source."""

        def read(first: int, count: int) -> npt.NDArray[np.float64]:
            out = np.empty(count)
            error = self.native.read_values(
                source=source, read=self.files.remote_read, first=first, out=out
            )
            if error:
                self.files.raise_remote()
                raise MeritFastError(f"{os.strerror(error)} while an adapter's base is read")
            return out

        return read

    def _decoded(self, entry: DecodedEntry) -> Any:
        assert entry.codes is not None
        cols = entry.shape[-1] if entry.shape else 1
        return self.native.CodesSource(
            file=self.files.number(entry.codes.file),
            offset=entry.codes.offset,
            cols=cols,
            row_bytes=entry.codes.num_bytes * cols // entry.num_elements,
            zeros=[self._grid(entry.zeros)] if entry.zeros else [],
            scales=[self._grid(scale) for scale in entry.scales],
            **_table(entry.dtype),
        )

    def _grid(self, grid: Grid) -> Any:
        columns = None
        if grid.columns is not None:
            columns = np.frombuffer(
                self.files.read(grid.columns, 0, grid.columns.num_elements), np.int32
            )
            self._kept.append(columns)
        return self.native.Grid(
            numbers=self._numbers(grid),
            rows=grid.rows,
            shape=grid.shape,
            block=(grid.block_rows, grid.block_cols),
            divides=grid.divides,
            columns=0 if columns is None else columns.ctypes.data,
        )

    def _numbers(self, grid: Grid) -> Any:
        if not grid.code:
            return self.source(grid.entry)
        place = {
            "file": self.files.number(grid.entry.file),
            "offset": grid.entry.offset,
            "cols": grid.shape[1],
            **_table(grid.code),
        }
        if grid.packed_rows:
            return self.native.PackedRowsSource(**place)
        return self.native.CodesSource(**place, row_bytes=grid.shape[1], zeros=[], scales=[])


def _table(code: str) -> dict[str, int]:
    return {"bits": code_bits(code), "table": code_values(code).ctypes.data}


def box_table(entry: AssembledEntry) -> tuple[npt.NDArray[np.int64], list[TensorEntry]]:
    """An assembled tensor's parts as numbers, and the entries that they are filled from.

    Returns:
        [P, 2 + 4 D] source, start, and D each of offsets, sizes, strides and steps; the sources.

    Raises:
        ValueError: a part reads outside of its source.
    """
    numbers: dict[int, int] = {}  # id of an entry -> its place
    sources: list[TensorEntry] = []
    rows = []
    ones = (1,) * len(entry.shape)
    for part in entry.parts:
        number = numbers.setdefault(id(part.source), len(sources))
        if number == len(sources):
            sources.append(part.source)
        steps = part.steps or ones
        rows.append((number, part.start, *part.offsets, *part.sizes, *part.strides, *steps))
    table = np.array(rows, np.int64).reshape(len(rows), 2 + 4 * len(entry.shape))
    dims = len(entry.shape)
    sizes = table[:, 2 + dims : 2 + 2 * dims]
    reach = (sizes - 1) * table[:, 2 + 2 * dims : 2 + 3 * dims]
    first = table[:, 1] + np.minimum(reach, 0).sum(axis=1)
    last = table[:, 1] + np.maximum(reach, 0).sum(axis=1)
    counts = np.array([source.num_elements for source in sources], np.int64)
    outside = ((first < 0) | (last >= counts[table[:, 0]])) & (sizes > 0).all(axis=1)
    if outside.any():
        part = entry.parts[int(np.flatnonzero(outside)[0])]
        raise ValueError(f"{entry.name}: a part reads outside of {part.source.name}")
    return table, sources
