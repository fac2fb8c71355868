"""The description of one tensor that a merge reads: where its values lie and how they are made.

Four forms, which nest: bytes of a file (``TensorEntry``), codes with scales in a file
(``DecodedEntry``), boxes of other entries (``AssembledEntry``), an entry with an adapter's changes
(``ChangedEntry``). ``merge.engine.values`` is their definition in NumPy.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.read.remote import Location


@dataclass(frozen=True)
class TensorEntry:
    """One tensor in a file. ``offset`` counts bytes from the start of ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Location
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Grid:
    """Numbers for the blocks of a matrix, scales or zero points, decoded to float64.

        number[i, j] = decode(entry)[i // block_rows, j // block_cols]

    In a stack of matrices each has a grid of its own; the grids follow each other in ``entry``.
    """

    entry: TensorEntry
    code: str  # name in CODES; "": floats of the entry's dtype
    rows: int  # of one matrix
    shape: tuple[int, int]  # of one matrix's grid
    block_rows: int
    block_cols: int
    divides: bool = False  # a scale that the value is divided by
    packed_rows: bool = False  # numbers of one column are packed into words, lowest bits first
    columns: TensorEntry | None = None  # [cols] int32 grid column of each column, by this order


@dataclass(frozen=True)
class DecodedEntry(TensorEntry):
    """A quantised tensor, decoded to float64 while it is read. No scales: all 1. No zeros: all 0.

        value[i, j] = (CODES[dtype].values[code[i, j]] - zero[i, j]) * scale[i, j] * ...

    Rows are those of all matrices in ``shape``; row i of ``codes`` holds code j at the bits from
    j * bits on, lowest first. ``num_bytes`` counts codes and scales, ``file`` and ``offset`` are
    those of the codes.
    """

    codes: TensorEntry | None = None
    scales: tuple[Grid, ...] = ()
    zeros: Grid | None = None
    # Stored tensors, each with what follows the stem (the name without ".weight") in its name.
    parts: tuple[tuple[str, TensorEntry], ...] = ()
    form: str = ""  # name in the table of formats; "": codes without scales

    @property
    def grids(self) -> tuple[Grid, ...]:
        return (*self.scales, *([self.zeros] if self.zeros else []))


@dataclass(frozen=True)
class Part:
    """A box of an assembled tensor, filled from another entry.

        values[offsets + steps * i] = source_values.flat[start + sum_d strides[d] * i[d]]

    for every index i with 0 <= i[d] < sizes[d]. All tuples have the assembled tensor's dimensions.
    """

    source: TensorEntry
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    strides: tuple[int, ...]  # in elements of the source; a transposed box has them swapped
    steps: tuple[int, ...] = ()  # (): all 1


@dataclass(frozen=True)
class AssembledEntry(TensorEntry):
    """A tensor whose values lie in boxes of other entries, each element in exactly one box.

    ``file``, ``offset`` are those of the first source, for messages; ``num_bytes`` the bytes that
    are read. ``dtype``: that of all sources if they are plain and agree, else "F64".
    """

    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class LowRank:
    """One tensor's change: scaling * B @ A, transposed for embeddings and layers of [in, out]."""

    name: str  # of the base's tensor
    a: TensorEntry  # [r, in]
    b: TensorEntry  # [out, r]
    scaling: float  # lora_alpha / r, or / sqrt(r) with use_rslora
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the base's tensor."""
        out = self.b.shape[0]
        into = self.a.shape[1]
        return (into, out) if self.transposed else (out, into)


@dataclass(frozen=True)
class ChangedEntry(TensorEntry):
    """``source`` with an adapter's changes, in float64. The other fields are the source's."""

    source: TensorEntry | None = None
    changes: tuple[LowRank, ...] = ()


def is_float(entry: TensorEntry) -> bool:
    """Whether a tensor holds numbers that can be averaged, by its values' dtype."""
    return value_dtype(entry) in FLOAT_DTYPES


def value_dtype(entry: TensorEntry) -> str:
    """The dtype in which the engine sees the tensor's values."""
    return "F64" if isinstance(entry, (DecodedEntry, ChangedEntry)) else entry.dtype


def stored_entries(entry: TensorEntry) -> Iterator[TensorEntry]:
    """Every tensor in a file from which an entry's values are made, scales and factors included."""
    if isinstance(entry, AssembledEntry):
        for part in entry.parts:
            yield from stored_entries(part.source)
    elif isinstance(entry, DecodedEntry):
        assert entry.codes is not None
        yield entry.codes
        for grid in entry.grids:
            yield from (grid.entry, *([grid.columns] if grid.columns else []))
    elif isinstance(entry, ChangedEntry):
        assert entry.source is not None
        yield from stored_entries(entry.source)
        for change in entry.changes:
            yield from (change.a, change.b)
    else:
        yield entry


def is_plain(entry: TensorEntry) -> bool:
    """Whether the values are a run of bytes in one file."""
    return not isinstance(entry, (DecodedEntry, AssembledEntry, ChangedEntry))


def quantised_source(entry: TensorEntry) -> DecodedEntry | None:
    """The quantised tensor of which an entry is a copy, whole and in any order of dimensions."""
    if isinstance(entry, AssembledEntry) and len(entry.parts) == 1:
        source = entry.parts[0].source
        return quantised_source(source) if source.num_elements == entry.num_elements else None
    return entry if isinstance(entry, DecodedEntry) else None


def is_quantised(entry: TensorEntry) -> bool:
    """Whether some of the values are decoded from codes."""
    if isinstance(entry, AssembledEntry):
        return any(is_quantised(part.source) for part in entry.parts)
    if isinstance(entry, ChangedEntry):
        return entry.source is not None and is_quantised(entry.source)
    return isinstance(entry, DecodedEntry)
