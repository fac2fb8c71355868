"""A distributed checkpoint as a ``Checkpoint``: every tensor assembled from its chunks."""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from typing import BinaryIO

from merit_fast.errors import InputError
from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.dcp.boxes import is_row_major, row_major
from merit_fast.merge.read.dcp.files import output_files
from merit_fast.merge.read.dcp.folder import choose_subtree, is_no_model
from merit_fast.merge.read.dcp.items import StoredChunk, read_item
from merit_fast.merge.read.dcp.metadata import (
    METADATA_FILE,
    Chunk,
    Metadata,
    Place,
    SavedBytes,
    SavedTensor,
    read_metadata,
)
from merit_fast.merge.read.dcp.tiles import tiling_fault
from merit_fast.merge.read.entries import AssembledEntry, Part, TensorEntry
from merit_fast.merge.read.files import folder_of, open_regular, size_of
from merit_fast.merge.read.headers import check_name
from merit_fast.merge.read.remote import Location
from merit_fast.records import record


@record
class DistributedCheckpoint(Checkpoint):
    """A checkpoint that lies in chunks.

    ``saved`` has the tensors by their names below ``place``. Later steps may rename ``tensors``;
    ``saved_as`` finds a tensor all the same.
    """

    folder: Location
    metadata: Metadata
    place: Place  # keys that lead to the model's dict
    saved: Mapping[str, SavedTensor]
    by_bytes: Mapping[tuple[Location, int], str]  # where a tensor begins -> its name in ``saved``
    others: tuple[SavedBytes, ...]  # values of the model that are no tensors
    left_out: tuple[str, ...]  # names of the rest

    @property
    def is_distributed(self) -> bool:
        return True

    def described_files(self) -> set[Location]:
        return {self.metadata.file, *(self.folder / other.item.file for other in self.others)}

    def names_left_out(self, keeps_values: bool) -> tuple[str, ...]:
        values = () if keeps_values else tuple(other.name for other in self.others)
        return (*self.left_out, *values)

    def saved_as(self, entry: TensorEntry) -> SavedTensor | None:
        """The saved tensor whose values an entry has, under this or an earlier name."""
        name = self.by_bytes.get((entry.file, entry.offset), entry.name)
        saved = self.saved.get(name)
        return saved if saved is not None and saved.shape == entry.shape else None


def read_distributed(
    path: Location, folder: Location, subtree: str | None, config: Location | None = None
) -> DistributedCheckpoint:
    """Reads ``.metadata`` and where each chunk of the model lies; no weights.

    Args:
        path: as the user names the model.
        folder: holds ``.metadata``.
        subtree: keys joined by dots that lead to the model's tensors; None: see
            ``choose_subtree``.
        config: the folder of config.json, if it is not the checkpoint's own.

    Raises:
        InputError: see ``read_metadata``, ``choose_subtree`` and ``read_item``; chunks of a tensor
            overlap, leave a hole or differ from .metadata.
    """
    metadata = read_metadata(folder / METADATA_FILE)
    place = choose_subtree(metadata, subtree, config or folder_of(folder))
    inside = _inside(metadata, place, subtree is not None)
    others = tuple(
        each
        for each in metadata.others.values()
        if each.place[: len(place)] == place
        and (subtree is not None or not is_no_model(each.place))
    )
    kept = {tensor.name for tensor in inside.values()} | {each.name for each in others}
    everything = (*metadata.tensors, *metadata.others)
    left_out = tuple(name for name in everything if name not in kept)
    tensors = _entries(metadata, folder, inside)
    by_bytes = {(e.file, e.offset): name for name, e in tensors.items() if e.num_bytes}
    shards = output_files(tensors.values())
    return DistributedCheckpoint(
        path, tensors, shards, folder, metadata, place, inside, by_bytes, others, left_out
    )


def _inside(metadata: Metadata, place: Place, is_asked: bool) -> dict[str, SavedTensor]:
    """The tensors below ``place`` by the names that they have there."""
    inside: dict[str, SavedTensor] = {}
    for tensor in metadata.tensors.values():
        if tensor.place[: len(place)] != place or (not is_asked and is_no_model(tensor.place)):
            continue
        name = ".".join(map(str, tensor.place[len(place) :]))
        check_name(metadata.file, name)
        if name in inside:
            raise InputError(
                f"{metadata.file}: {tensor.name}: has the place of {inside[name].name}"
            )
        inside[name] = tensor
    return inside


def _entries(
    metadata: Metadata, folder: Location, inside: Mapping[str, SavedTensor]
) -> dict[str, TensorEntry]:
    """Name -> entry. Every shard is opened once."""
    with ExitStack() as stack:
        opened: dict[str, tuple[BinaryIO, int]] = {}
        for tensor in inside.values():
            for chunk in tensor.chunks:
                if chunk.item and chunk.has_elements and chunk.item.file not in opened:
                    file = stack.enter_context(open_regular(folder / chunk.item.file))
                    opened[chunk.item.file] = (file, size_of(file))
        return {
            name: _entry(metadata, folder, name, tensor, opened) for name, tensor in inside.items()
        }


def _entry(
    metadata: Metadata,
    folder: Location,
    name: str,
    tensor: SavedTensor,
    opened: Mapping[str, tuple[BinaryIO, int]],
) -> TensorEntry:
    fault = tiling_fault(tensor.shape, [(c.offsets, c.sizes) for c in tensor.chunks])
    if fault:
        raise InputError(f"{metadata.file}: {tensor.name}: {fault}")
    parts = []
    for chunk in tensor.chunks:
        if chunk.item is None or not chunk.has_elements:
            continue
        file = folder / chunk.item.file
        opened_file, size = opened[chunk.item.file]
        stored = read_item(opened_file, file, tensor.name, chunk.item, size)
        _check_chunk(f"{file}: {tensor.name}", tensor, chunk, stored)
        parts.append((chunk, stored, file))
    if not parts:  # it has no elements
        return TensorEntry(name, tensor.dtype, tensor.shape, metadata.file, 0, 0)
    if len(parts) == 1 and is_row_major(parts[0][0].sizes, parts[0][1].view.strides):
        chunk, stored, file = parts[0]
        item = ITEM_BYTES[tensor.dtype]
        start = stored.offset + stored.view.start * item
        num_bytes = item * math.prod(chunk.sizes)
        return TensorEntry(name, tensor.dtype, tensor.shape, file, start, num_bytes)
    boxes = tuple(_part(name, chunk, stored, file) for chunk, stored, file in parts)
    first = boxes[0].source
    total = sum(box.source.num_bytes for box in boxes)
    entry = TensorEntry(name, tensor.dtype, tensor.shape, first.file, first.offset, total)
    return AssembledEntry(**{key: getattr(entry, key) for key in _FIELDS}, parts=boxes)


_FIELDS = ("name", "dtype", "shape", "file", "offset", "num_bytes")


def _part(name: str, chunk: Chunk, stored: StoredChunk, file: Location) -> Part:
    item = ITEM_BYTES[stored.view.dtype]
    if is_row_major(chunk.sizes, stored.view.strides):
        offset = stored.offset + stored.view.start * item
        source = TensorEntry(
            name, stored.view.dtype, chunk.sizes, file, offset, item * math.prod(chunk.sizes)
        )
        return Part(source, chunk.offsets, chunk.sizes, 0, row_major(chunk.sizes))
    shape = (stored.view.num_elements,)
    source = TensorEntry(name, stored.view.dtype, shape, file, stored.offset, item * shape[0])
    return Part(source, chunk.offsets, chunk.sizes, stored.view.start, stored.view.strides)


def _check_chunk(where: str, tensor: SavedTensor, chunk: Chunk, stored: StoredChunk) -> None:
    if stored.view.dtype != tensor.dtype:
        rule = f"dtype must be {tensor.dtype} as in {METADATA_FILE}"
        raise InputError(f"{where}: {rule}, got {stored.view.dtype}")
    if stored.view.sizes != chunk.sizes:
        rule = f"shape must be {list(chunk.sizes)} as in {METADATA_FILE}"
        raise InputError(f"{where}: {rule}, got {list(stored.view.sizes)}")
