"""An input's values in NumPy, as the engine makes them, and errors about non-finite ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from merit_fast.kernels.average._eager import to_float64
from merit_fast.kernels.average.dtypes import DTYPES
from merit_fast.kernels.lazy import np
from merit_fast.merge.engine.changes import apply_change
from merit_fast.merge.engine.decode import decoded
from merit_fast.merge.engine.opened import OpenFiles
from merit_fast.merge.engine.plan import Segment
from merit_fast.merge.option_names import OptionError
from merit_fast.merge.read.entries import (
    AssembledEntry,
    ChangedEntry,
    DecodedEntry,
    Part,
    TensorEntry,
)
from merit_fast.records import replace

if TYPE_CHECKING:
    import numpy.typing as npt

Array: TypeAlias = "npt.NDArray[np.float64]"


def values(entry: TensorEntry, first: int, count: int, files: OpenFiles) -> tuple[np.ndarray, str]:
    """Elements of an input and their dtype: as stored (bf16 as uint16 bits), or decoded float64."""
    if isinstance(entry, ChangedEntry):
        return _changed(entry, first, count, files), "F64"
    if isinstance(entry, AssembledEntry):
        return _assembled(entry, first, count, files), entry.dtype
    if isinstance(entry, DecodedEntry):
        return decoded(entry, first, count, files), "F64"
    data = files.read(entry, first, count)
    return np.frombuffer(data, DTYPES[entry.dtype].bits), entry.dtype


def _changed(entry: ChangedEntry, first: int, count: int, files: OpenFiles) -> Array:
    assert entry.source is not None
    total = to_float64(*values(entry.source, first, count, files))
    for number, change in enumerate(entry.changes):
        earlier = replace(entry, changes=entry.changes[:number])

        def before(at: int, n: int, earlier: ChangedEntry = earlier) -> Array:
            return _changed(earlier, at, n, files)

        total = apply_change(change, total, entry, first, files, before)
    return total


def _assembled(
    entry: AssembledEntry, first: int, count: int, files: OpenFiles
) -> npt.NDArray[np.generic]:
    out = np.empty(count, DTYPES[entry.dtype].bits)
    for part in entry.parts:
        target, source = _overlap(part, entry.shape, first, count)
        if not len(target):
            continue
        low = int(source.min())
        loaded, dtype = values(part.source, low, int(source.max()) - low + 1, files)
        taken = loaded[source - low]
        if dtype != entry.dtype and entry.dtype != "F64":
            raise ValueError(f"{entry.name}: is {entry.dtype}, a part of it is {dtype}")
        out[target] = taken if dtype == entry.dtype else to_float64(taken, dtype)
    return out


def _overlap(
    part: Part, shape: tuple[int, ...], first: int, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of a part's elements within a run of its tensor, and within its source."""
    target = np.array(-first, np.int64)
    source = np.array(part.start, np.int64)
    step = math.prod(shape)
    for d, size in enumerate(part.sizes):
        step //= shape[d]
        index = np.arange(size)
        places = (part.offsets[d] + (part.steps[d] if part.steps else 1) * index) * step
        if d == 0:  # other rows are not looked at
            inside = (places + step > first) & (places < first + count)
            index = index[inside]
            places = places[inside]
        target = np.add.outer(target, places)
        source = np.add.outer(source, index * part.strides[d])
    target, source = target.ravel(), source.ravel()
    inside = (target >= 0) & (target < count)
    return target[inside], source[inside]


def _places(
    entry: TensorEntry, first: int, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of each element of a run."""
    rows, columns = np.divmod(
        np.arange(first, first + count), entry.shape[-1] if entry.shape else 1
    )
    return rows, columns


def finite(array: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray((array & 0x7F80) != 0x7F80 if dtype == "BF16" else np.isfinite(array))


def nonfinite_error(segment: Segment, chunk: int, step: int, files: OpenFiles) -> OptionError:
    """An error about the first bad element of the chunk, with its tensor and its input."""
    count = min(step, segment.num_elements - chunk)
    for entry in segment.inputs:
        bad = np.flatnonzero(~finite(*values(entry, chunk, count, files)))
        if len(bad):
            name = segment.name_at(chunk + int(bad[0]))
            return _nonfinite(f"{entry.file}: {name}: must be finite, holds NaN or infinity")
    name = segment.name_at(chunk)
    return _nonfinite(f"{segment.inputs[0].file}: {name}: the result overflows {segment.dtype}")


def _nonfinite(rule: str) -> OptionError:
    return OptionError(rule, "allow_nonfinite", "{} writes it anyway", "True")
