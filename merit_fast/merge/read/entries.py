"""The description of one tensor that a merge reads: where its values lie and how they are made.

Four forms, which nest: bytes of a file (``TensorEntry``), codes with scales in a file
(``DecodedEntry``), boxes of other entries (``AssembledEntry``), an entry with an adapter's changes
(``ChangedEntry``). ``merge.engine.values`` is their definition in NumPy.
"""

import math
from collections.abc import Iterable, Iterator

from merit_fast.kernels.average.dtypes import FLOAT_DTYPES
from merit_fast.merge.read.remote import Location
from merit_fast.records import record


@record(many=True)
class TensorEntry:
    """One tensor in a file. ``offset`` counts bytes from the start of ``file``."""

    __slots__ = ("dtype", "file", "name", "num_bytes", "offset", "shape")

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Location
    offset: int
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@record
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


@record
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


@record
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


@record
class AssembledEntry(TensorEntry):
    """A tensor whose values lie in boxes of other entries, each element in exactly one box.

    ``file``, ``offset`` are those of the first source, for messages; ``num_bytes`` the bytes that
    are read. ``dtype``: the ``value_dtype`` of all sources if they agree, else "F64".
    """

    parts: tuple[Part, ...] = ()


@record
class LowRank:
    """scaling * B @ A, added to a tensor [out, in, ...], or transposed to one of [in, out].

    Hu et al. 2021, arXiv 2106.09685. A convolution's dimensions after the second count as ``in``.
    """

    name: str  # of the base's tensor
    a: TensorEntry  # [r, in, ...]
    b: TensorEntry  # [out, r], with more dimensions of 1 for a convolution
    scaling: float  # lora_alpha / r, or / sqrt(r) with use_rslora
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        shape = (self.b.shape[0], *self.a.shape[1:])
        return shape[::-1] if self.transposed else shape

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return self.a, self.b


@record
class ExpertsLowRank:
    """scaling * B_e @ A_e, added to matrix e of [E, out, in], or transposed to one of [E, in, out].

    A_e = A.reshape(E, r, in)[e], B_e = B.reshape(out, r, E)[:, :, e]: A stacks whole experts, B
    alternates between them.
    """

    a: TensorEntry  # [E * r, in]
    b: TensorEntry  # [out, r * E]
    scaling: float
    experts: int
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the base's tensor."""
        matrix = (self.b.shape[0], self.a.shape[1])
        return (self.experts, *(matrix[::-1] if self.transposed else matrix))

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return self.a, self.b


@record
class Added:
    """scaling * vector, added to a tensor of as many elements: a bias that LoRA trains."""

    vector: TensorEntry
    scaling: float

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.vector,)


@record
class Magnitude:
    """Vectors of given lengths: w_i * m_i / |w_i| for each row w_i, or column, of a matrix.

    DoRA, Liu et al. 2024, arXiv 2402.09353. The rows are those of [out, in, ...], with all later
    dimensions; ``by_column`` where the tensor is [in, out].
    """

    lengths: TensorEntry  # [out], in any shape
    by_column: bool

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.lengths,)


@record
class Rows:
    """New values of some rows of a matrix: row indices[i] becomes row i of ``rows``."""

    rows: TensorEntry  # [n, columns]
    indices: tuple[int, ...]  # n different rows

    @property
    def stored(self) -> tuple[TensorEntry, ...]:
        return (self.rows,)


Change = LowRank | ExpertsLowRank | Added | Magnitude | Rows


@record
class ChangedEntry(TensorEntry):
    """``source`` with an adapter's changes in their order, in float64. Other fields: the source's.

    ``merge.engine.changes`` defines each change in NumPy.
    """

    source: TensorEntry | None = None
    changes: tuple[Change, ...] = ()


def is_float(entry: TensorEntry) -> bool:
    """Whether a tensor holds numbers that can be averaged, by its values' dtype."""
    if type(entry) is TensorEntry and entry.dtype in FLOAT_DTYPES:  # nearly all, and there are many
        return True
    return value_dtype(entry) in FLOAT_DTYPES


def value_dtype(entry: TensorEntry) -> str:
    """The dtype in which the engine sees the tensor's values."""
    return "F64" if isinstance(entry, (DecodedEntry, ChangedEntry)) else entry.dtype


def own_dtype(entry: TensorEntry) -> str:
    """The dtype that the model itself has for a tensor.

    Where parts of several dtypes are joined, the first part is the model's own.
    """
    while entry.dtype == "F64" and isinstance(entry, (AssembledEntry, ChangedEntry)):
        source = entry.parts[0].source if isinstance(entry, AssembledEntry) else entry.source
        assert source is not None
        entry = source
    return entry.dtype


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
            yield from change.stored
    else:
        yield entry


def files_of(entries: Iterable[TensorEntry]) -> set[Location]:
    """The files that hold some part of entries."""
    files: set[Location] = set()
    last: Location | None = None
    for entry in entries:
        if type(entry) is not TensorEntry:
            files.update(stored.file for stored in stored_entries(entry))
        elif entry.file is not last:  # neighbours share their file, whose hash takes longer
            last = entry.file
            files.add(last)
    return files


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
    if type(entry) is TensorEntry:  # nearly all, and there are many
        return False
    if isinstance(entry, AssembledEntry):
        return any(is_quantised(part.source) for part in entry.parts)
    if isinstance(entry, ChangedEntry):
        return entry.source is not None and is_quantised(entry.source)
    return isinstance(entry, DecodedEntry)
