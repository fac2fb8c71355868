"""Which chunk of which tensor lies in which shard of a distributed checkpoint that is written."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from zlib import crc32

from merit_fast.kernels.average.dtypes import ITEM_BYTES
from merit_fast.merge.engine.layout import OutputFile, OutputTensor
from merit_fast.merge.read.checkpoint import Checkpoint
from merit_fast.merge.read.dcp.checkpoint import DistributedCheckpoint
from merit_fast.merge.read.dcp.metadata import Item, Place, SavedBytes, SavedTensor
from merit_fast.merge.write.distcp.items import ALIGNMENT, item_form
from merit_fast.records import record

Sizes = tuple[int, ...]
_BLOCK_BYTES = 1 << 20
_CHUNKS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class PlacedChunk:
    """A chunk and the place of its item. ``name`` is the tensor's in the plan."""

    name: str
    dtype: str
    offsets: Sizes
    sizes: Sizes
    num_bytes: int
    item: Item
    start: int  # first byte of the values, from the start of the file


@record
class DistributedFile:
    """One shard. It is the ``Frame`` of its chunks' bytes."""

    name: str
    chunks: tuple[PlacedChunk, ...]
    others: tuple[tuple[SavedBytes, int], ...]  # each with its offset in this file
    num_bytes: int

    def begin(self, descriptor: int) -> None:
        """Writes the bytes around the chunks' values."""
        for chunk in self.chunks:
            form = item_form(chunk.dtype, chunk.sizes, chunk.num_bytes)
            os.pwrite(descriptor, form.head, chunk.item.offset)
            os.pwrite(descriptor, form.tail, chunk.start + chunk.num_bytes)

    def finish(self, descriptor: int, threads: int) -> None:
        """Writes the CRC-32 of each chunk's values, which are read back, from memory as a rule."""
        chunks = iter(self.chunks)
        with ThreadPoolExecutor(threads) as pool:
            while batch := list(itertools.islice(chunks, _CHUNKS_AT_ONCE)):
                for written in [pool.submit(_write_checksum, chunk, descriptor) for chunk in batch]:
                    written.result()


@record
class DistributedLayout:
    """All shards; for each tensor's name in the plan, its name and keys in the state dict."""

    files: tuple[DistributedFile, ...]
    tensors: Mapping[str, OutputTensor]
    saved_names: Mapping[str, str]
    places: Mapping[str, Place]
    source: DistributedCheckpoint | None  # the first input, if it is such a checkpoint


def distributed_layout(first: Checkpoint, files: Sequence[OutputFile]) -> DistributedLayout:
    """The first input's shards and chunks, or one chunk per tensor and one shard per file.

    Args:
        first: the first input.
        files: the output's tensors, as ``lay_out`` gives them.
    """
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    source = first if isinstance(first, DistributedCheckpoint) else None
    names = {name: name for name in tensors}
    places: dict[str, Place] = {name: (name,) for name in tensors}
    boxes: dict[str, list[tuple[str, Sizes, Sizes]]] = {}
    others: dict[str, list[SavedBytes]] = {}
    if source is not None:
        for name, tensor in tensors.items():
            saved = _saved(tensor, source)
            places[name] = saved.place if saved else (*source.place, name)
            names[name] = saved.name if saved else ".".join(map(str, places[name]))
        for each in source.others:
            others.setdefault(each.item.file, []).append(each)
    for number, file in enumerate(files):
        for tensor in file.tensors:
            for shard, offsets, sizes in _boxes(tensor, source, number):
                boxes.setdefault(shard, []).append((tensor.name, offsets, sizes))
    shards = [
        _file(shard, boxes.get(shard, []), others.get(shard, []), tensors)
        for shard in sorted(boxes.keys() | others.keys(), key=_number)
    ]
    return DistributedLayout(tuple(shards), tensors, names, places, source)


def _boxes(
    tensor: OutputTensor, source: DistributedCheckpoint | None, number: int
) -> Iterator[tuple[str, Sizes, Sizes]]:
    """Shard, offsets and sizes of each chunk; also of those without elements, as torch does."""
    saved = _saved(tensor, source) if source else None
    if saved is not None:
        for chunk in saved.chunks:
            if chunk.item is not None:
                yield chunk.item.file, chunk.offsets, chunk.sizes
    else:
        shard = f"__{0 if source else number}_0.distcp"
        yield shard, (0,) * len(tensor.shape), tensor.shape


def _saved(tensor: OutputTensor, source: DistributedCheckpoint) -> SavedTensor | None:
    entry = source.tensors.get(tensor.name)
    return source.saved_as(entry) if entry is not None else None


def _file(
    name: str,
    boxes: Sequence[tuple[str, Sizes, Sizes]],
    others: Sequence[SavedBytes],
    tensors: Mapping[str, OutputTensor],
) -> DistributedFile:
    at = 0
    copied = []
    for each in others:
        copied.append((each, at))
        at += each.item.length
    chunks = []
    for tensor, offsets, sizes in boxes:
        at += -at % ALIGNMENT
        dtype = tensors[tensor].dtype
        num_bytes = ITEM_BYTES[dtype]
        for size in sizes:
            num_bytes *= size
        form = item_form(dtype, sizes, num_bytes)
        length = form.start + num_bytes + len(form.tail)
        item = Item(name, at, length)
        chunks.append(PlacedChunk(tensor, dtype, offsets, sizes, num_bytes, item, at + form.start))
        at += length
    return DistributedFile(name, tuple(chunks), tuple(copied), at)


def _write_checksum(chunk: PlacedChunk, descriptor: int) -> None:
    crc = 0
    end = chunk.start + chunk.num_bytes
    for at in range(chunk.start, end, _BLOCK_BYTES):
        crc = crc32(os.pread(descriptor, min(_BLOCK_BYTES, end - at), at), crc)
    for place in item_form(chunk.dtype, chunk.sizes, chunk.num_bytes).crc_places:
        os.pwrite(descriptor, crc.to_bytes(4, "little"), chunk.item.offset + place)


def _number(shard: str) -> tuple[int, str]:
    """Rank first, as torch numbers shards: __10_0.distcp after __9_0.distcp."""
    rank = shard.removeprefix("__").partition("_")[0]
    return (int(rank) if rank.isdecimal() else 0, shard)
