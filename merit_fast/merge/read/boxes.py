"""A box of a tensor as an entry of its own."""

import math
from collections.abc import Sequence

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.entries import (
    AssembledEntry,
    Part,
    TensorEntry,
    is_plain,
    stored_entries,
    value_dtype,
)

Numbers = tuple[int, ...]


def box_of(entry: TensorEntry, offsets: Numbers, sizes: Numbers) -> TensorEntry:
    """The entry whose values are ``values[offsets : offsets + sizes]``.

    A box that is a run of a file's bytes becomes a plain entry, so that it is read as one.

    Args:
        entry: of any form.
        offsets: first index of the box in each dimension.
        sizes: of the box; at least 1.
    """
    if sizes == entry.shape:
        return entry
    if isinstance(entry, AssembledEntry) and not any(part.steps for part in entry.parts):
        parts = [cut for part in entry.parts if (cut := _cut(part, offsets, sizes)) is not None]
    else:
        strides = row_major(entry.shape)
        start = _dot(offsets, strides)
        parts = [Part(entry, (0,) * len(sizes), sizes, start, strides)]
    return _whole(parts[0], entry.name, sizes) or _assembled(entry, sizes, parts)


def row_major(sizes: Sequence[int]) -> Numbers:
    """Steps in elements from one index to the next, in each dimension."""
    strides = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def is_row_major(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a view is one run of elements in row-major order."""
    if 0 in sizes:
        return True
    wanted = row_major(sizes)
    return all(
        size == 1 or stride == step
        for size, stride, step in zip(sizes, strides, wanted, strict=True)
    )


def _cut(part: Part, offsets: Numbers, sizes: Numbers) -> Part | None:
    """What a box has of a part; offsets count from the box."""
    low = tuple(map(max, part.offsets, offsets))
    ends = [
        min(at + size, first + count)
        for at, size, first, count in zip(part.offsets, part.sizes, offsets, sizes, strict=True)
    ]
    kept = tuple(end - at for end, at in zip(ends, low, strict=True))
    if any(size <= 0 for size in kept):
        return None
    inside = tuple(at - first for at, first in zip(low, part.offsets, strict=True))
    start = part.start + _dot(inside, part.strides)
    moved = tuple(at - first for at, first in zip(low, offsets, strict=True))
    return Part(part.source, moved, kept, start, part.strides)


def _whole(part: Part, name: str, sizes: Numbers) -> TensorEntry | None:
    """A plain entry, if the part is the box and a run of a file."""
    source = part.source
    if part.sizes != sizes or not is_plain(source) or not is_row_major(sizes, part.strides):
        return None
    item = ITEM_BYTES[source.dtype]
    offset = source.offset + part.start * item
    return TensorEntry(name, source.dtype, sizes, source.file, offset, item * math.prod(sizes))


def _assembled(entry: TensorEntry, sizes: Numbers, parts: Sequence[Part]) -> AssembledEntry:
    dtypes = {value_dtype(part.source) for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64"
    first = next(stored_entries(parts[0].source))
    num_bytes = sum(ITEM_BYTES[value_dtype(part.source)] * math.prod(part.sizes) for part in parts)
    return AssembledEntry(
        entry.name, dtype, sizes, first.file, first.offset, num_bytes, tuple(parts)
    )


def _dot(left: Sequence[int], right: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))
