"""Integer counters, such as BatchNorm's num_batches_tracked: the largest of all models is kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.kernels.lazy import np
from merit_fast.merge.engine.layout import OutputFile, OutputTensor
from merit_fast.merge.engine.opened import open_files
from merit_fast.merge.engine.values import values
from merit_fast.merge.read.entries import TensorEntry, stored_entries


def is_counter(entry: TensorEntry) -> bool:
    """Whether a tensor is a single integer. Others are no counts and must be equal."""
    return entry.dtype[0] in "IU" and entry.num_elements == 1


def largest(entry: TensorEntry, chunks: Sequence[bytes]) -> bytes:
    """The largest of several values of a counter's dtype."""
    return max(chunks, key=lambda chunk: _number(entry, chunk))


def counter_notes(files: Sequence[OutputFile]) -> list[str]:
    """A sentence about counters that differ between the inputs; reads a few bytes of each.

    Raises:
        InputError, MeritFastError: an input cannot be read.
    """
    tensors = [
        tensor
        for file in files
        for tensor in file.tensors
        if len(tensor.inputs) > 1 and is_counter(tensor.inputs[0])
    ]
    differing = [(name, found) for name, found in _read(tensors) if len(set(found)) > 1]
    if not differing:
        return []
    name, found = differing[0]
    counts = f"{len(differing)} integer counter{'s' * (len(differing) != 1)}"
    shown = ", ".join(map(str, found))
    return [f"{counts} that differ take the largest value: {name} ({shown}) becomes {max(found)}"]


def _read(tensors: Iterable[OutputTensor]) -> list[tuple[str, list[int]]]:
    """The numbers of every counter, one for each input."""
    tensors = list(tensors)
    if not tensors:
        return []
    sources = {
        stored.file for tensor in tensors for entry in tensor.inputs for stored in
        stored_entries(entry)
    }  # fmt: skip
    with open_files(sources, None) as opened:

        def number(entry: TensorEntry) -> int:
            return _number(entry, values(entry, 0, 1, opened)[0].tobytes())

        return [(tensor.name, [number(entry) for entry in tensor.inputs]) for tensor in tensors]


def _number(entry: TensorEntry, chunk: bytes) -> int:
    return int(np.frombuffer(chunk, f"{entry.dtype[0].lower()}{ITEM_BYTES[entry.dtype]}")[0])
