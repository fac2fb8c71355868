"""The description of one tensor that a merge reads: where its values lie and how they are made.

Four forms, which nest: bytes of a file (``TensorEntry``), codes with scales in a file
(``DecodedEntry``), boxes of other entries (``AssembledEntry``), an entry with an adapter's changes
(``ChangedEntry``). ``merge.engine.values`` is their definition in NumPy.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from merit_fast.kernels.average.dtypes import FLOAT_DTYPES, FP8_DTYPES
from merit_fast.merge.read.remote import Location


@dataclass(frozen=True, slots=True)
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
class Scales:
    """value[i, j] = stored[i, j] * scale[i // block_rows, j // block_cols]"""

    entry: TensorEntry
    block_rows: int
    block_cols: int


@dataclass(frozen=True)
class DecodedEntry(TensorEntry):
    """A tensor of 8-bit floats, decoded to float64 while it is read. ``scales`` None: all 1."""

    scales: Scales | None = None


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
    if type(entry) is TensorEntry and entry.dtype in FLOAT_DTYPES:  # nearly all, and there are many
        return True
    return value_dtype(entry) in FLOAT_DTYPES


def value_dtype(entry: TensorEntry) -> str:
    """The dtype in which the engine sees the tensor's values."""
    if isinstance(entry, (DecodedEntry, ChangedEntry)) or entry.dtype in FP8_DTYPES:
        return "F64"
    return entry.dtype


def stored_entries(entry: TensorEntry) -> Iterator[TensorEntry]:
    """Every tensor in a file from which an entry's values are made, scales and factors included."""
    if isinstance(entry, AssembledEntry):
        for part in entry.parts:
            yield from stored_entries(part.source)
    elif isinstance(entry, ChangedEntry):
        assert entry.source is not None
        yield from stored_entries(entry.source)
        for change in entry.changes:
            yield from (change.a, change.b)
    else:
        yield entry
        if isinstance(entry, DecodedEntry) and entry.scales:
            yield entry.scales.entry


def is_plain(entry: TensorEntry) -> bool:
    """Whether the values are a run of bytes in one file."""
    return not isinstance(entry, (DecodedEntry, AssembledEntry, ChangedEntry))
